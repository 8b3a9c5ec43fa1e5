#!/usr/bin/env python3
"""Stands in for `gcloud` on PATH: notes its arguments, plays a slice whose workers are folders.

`FAKE_GCLOUD` names the folder with its state: `calls.jsonl`, `slice.json`, `queue.json`, and one
home a worker in `workers/`. What ssh is to run there, it really runs.

A test makes it fail with files there, which hold how often, empty ones for ever: `no_describe` (of
a slice), `no_describe_queue`, `no_delete`, `no_copy`. `unreachable` holds the workers that do not
answer.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["FAKE_GCLOUD"])
SLICE, QUEUE = FOLDER / "slice.json", FOLDER / "queue.json"


def main(argv: list[str]) -> int:
    """Answers one command."""
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(["gcloud", *argv]) + "\n")
    if argv[:2] == ["auth", "list"]:
        print(os.environ.get("FAKE_ACCOUNT", "me@example.com"))
        return 0
    assert argv[:2] == ["compute", "tpus"], argv
    kind, verb, *rest = argv[2:]
    flags = {
        flag: "" if value.startswith("--") else value
        for flag, value in zip(rest, [*rest[1:], "--"], strict=True)
        if flag.startswith("--")
    }
    return {
        ("tpu-vm", "describe"): describe_slice,
        ("tpu-vm", "create"): create_slice,
        ("tpu-vm", "delete"): delete_slice,
        ("tpu-vm", "scp"): copy,
        ("tpu-vm", "ssh"): ssh,
        ("queued-resources", "describe"): describe_queue,
        ("queued-resources", "create"): create_queue,
        ("queued-resources", "delete"): delete_queue,
    }[kind, verb](rest, flags)


def absent(what: str) -> int:
    """As gcloud says it."""
    print(
        f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '{what}' was not found", file=sys.stderr
    )
    return 1


def fails(what: str) -> bool:
    """Whether a test wants it to, this time."""
    path = FOLDER / what
    if not path.exists():
        return False
    left = path.read_text().strip()
    if left == "1":
        path.unlink()
    elif left:
        path.write_text(str(int(left) - 1))
    print("ERROR: PERMISSION_DENIED: Cloud TPU API has not been used", file=sys.stderr)
    return True


def describe_slice(rest, flags) -> int:
    if fails("no_describe"):
        return 1
    if not SLICE.exists():
        return absent("nodes/x")
    found = json.loads(SLICE.read_text())
    print(found["state"], found["type"], found["hosts"], sep="\t")
    return 0


def create_slice(rest, flags, owner: str = "") -> int:
    hosts = int(os.environ.get("FAKE_HOSTS", "2"))
    for host in range(hosts):
        (FOLDER / "workers" / str(host)).mkdir(parents=True)
    kind = flags["--accelerator-type"]
    SLICE.write_text(json.dumps({"state": "READY", "type": kind, "hosts": hosts, "owner": owner}))
    return 0


def owner_of_slice() -> str | None:
    """The queued resource that gave it, "" for a slice made by `create`, None where none is."""
    return json.loads(SLICE.read_text())["owner"] if SLICE.exists() else None


def delete_slice(rest, flags) -> int:
    if fails("no_delete"):
        return 1
    if owner_of_slice():
        print("ERROR: FAILED_PRECONDITION: it belongs to a queued resource", file=sys.stderr)
        return 1
    remove_slice()
    return 0


def remove_slice() -> None:
    """Jobs end with their machines."""
    for path in FOLDER.glob("workers/*/deevisum_jax/job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
    SLICE.unlink()
    shutil.rmtree(FOLDER / "workers")


def describe_queue(rest, flags) -> int:
    if fails("no_describe_queue"):
        return 1
    if not QUEUE.exists():
        return absent("queuedResources/x")
    queue = json.loads(QUEUE.read_text())
    if queue["states"][0] == "ACTIVE" and not queue["given"]:
        create_slice(rest, {"--accelerator-type": queue["type"]}, owner="queue")
        queue["given"] = True
    print(queue["states"][0])
    queue["states"] = queue["states"][1:] or queue["states"]
    QUEUE.write_text(json.dumps(queue))
    return 0


def create_queue(rest, flags) -> int:
    states = os.environ.get("FAKE_QUEUE", "ACTIVE").split()
    QUEUE.write_text(
        json.dumps({"states": states, "type": flags["--accelerator-type"], "given": False})
    )
    return 0


def delete_queue(rest, flags) -> int:
    assert "--force" in flags, "a queued resource with a slice is only deleted by force"
    if fails("no_delete"):
        return 1
    QUEUE.unlink()
    if owner_of_slice():
        remove_slice()
    return 0


def workers(flags) -> list[pathlib.Path]:
    """Homes of the workers named; none answers when the slice was taken away."""
    if json.loads(SLICE.read_text())["state"] != "READY":
        print("ssh: connect to host: Connection timed out", file=sys.stderr)
        sys.exit(255)
    homes = sorted((FOLDER / "workers").iterdir())
    return homes if flags["--worker"] == "all" else [homes[int(flags["--worker"])]]


def copy(rest, flags) -> int:
    if fails("no_copy"):
        return 1
    source, target = rest[:2]
    for home in workers(flags):
        shutil.copy(source, home / target.split(":")[1])
    return 0


def ssh(rest, flags) -> int:
    path = os.pathsep.join([str(FOLDER / "worker_bin"), os.environ["PATH"]])
    codes = []
    unreachable = FOLDER / "unreachable"
    for home in workers(flags):
        if unreachable.exists() and home.name in unreachable.read_text().split():
            print(f"ssh: connect to host {home.name}: Connection timed out", file=sys.stderr)
            codes.append(255)
            continue
        env = {**os.environ, "HOME": str(home), "PATH": path}
        command = flags["--command"]
        codes.append(subprocess.run(["bash", "-c", command], env=env, cwd=home).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
