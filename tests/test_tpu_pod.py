"""scripts/tpu_pod.sh against a gcloud that plays a slice, whose workers are folders here.

The real gcloud is never on PATH: only the few tools that the scripts use are linked into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
# What the scripts call, gcloud apart.
TOOLS = (
    *("awk", "bash", "cat", "chmod", "date", "dirname", "env", "flock", "git", "grep", "gzip"),
    *("head", "hostname", "mkdir", "mktemp", "mv", "nohup", "rm", "sed", "setsid", "sleep", "sort"),
    *("tar", "touch", "wc"),
)
AT = ("--name", "first", "--zone", "us-west4-a")
TYPE = ("--accelerator_type", "v5litepod-16")
MAIN = ("--config", "configs/quickstart.py", "--workdir", "gs://bucket/first")

# Stands in for `python3 -m pip install ... --target DIR uv` and for what that uv then makes.
_PYTHON3 = """#!/usr/bin/env bash
while [[ $1 != --target ]]; do shift; done
mkdir -p "$2/bin"
cat >"$2/bin/uv" <<'UV'
#!/usr/bin/env bash
echo "uv $*" >>"$HOME/uv.log"
[[ $1 == venv ]] || exit 0
mkdir -p "${@: -1}/bin"
printf '%s\\n' '#!/usr/bin/env bash' 'for word; do echo "<$word>"; done >>"$HOME/python.log"' \\
  >"${@: -1}/bin/python"
chmod +x "${@: -1}/bin/python"
UV
chmod +x "$2/bin/uv"
"""


@pytest.fixture(autouse=True)
def _hearing():
    """A shell makes background jobs deaf to these signals, and what tests start inherits that."""
    before = {how: signal.getsignal(how) for how in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for how, handler in before.items():
        signal.signal(how, handler)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A committed checkout with the two scripts and a config."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "scripts").mkdir()
    for name in ("tpu_pod.sh", "tpu_worker.sh"):
        shutil.copy(REPO / "scripts" / name, folder / "scripts" / name)
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.py").write_text("config = 1\n")
    (folder / ".gitignore").write_text("/build/\n")
    for words in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--message", "all"),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


class Pod:
    """The script, the world it sees, and what it did there."""

    def __init__(self, checkout: pathlib.Path, folder: pathlib.Path) -> None:
        self.checkout, self.folder = checkout, folder
        tools = folder / "tools"
        for made in (tools, folder / "bin", folder / "worker_bin", folder / "home"):
            made.mkdir()
        for tool in TOOLS:
            (tools / tool).symlink_to(shutil.which(tool))
        self.env = {
            "PATH": f"{folder / 'bin'}:{tools}",
            "HOME": str(folder / "home"),
            "FAKE_GCLOUD": str(folder),
            "TPU_POD_POLL_S": "0",
            "TPU_POD_GRACE_S": "0",
            "TPU_POD_RETRY_S": "0",
            "TPU_POD_DELETE_PAUSE_S": "0",
            "TPU_WORKER_RESTART_PAUSE_S": "0",
            "TPU_WORKER_LOG_S": "5",
            "TPU_WORKER_STOP_S": "20",
        }
        (folder / "worker_bin" / "python3").write_text(_PYTHON3)
        (folder / "worker_bin" / "python3").chmod(0o755)

    def with_gcloud(self) -> Pod:
        """Puts the false gcloud on PATH, and a git that notes what is archived."""
        python = os.path.realpath("/proc/self/exe")
        fake = REPO / "tests" / "fake_gcloud.py"
        self._program("gcloud", f'exec {shlex.quote(python)} -S -E {shlex.quote(str(fake))} "$@"')
        self._program(
            "git",
            f"""for word; do [[ $word != archive ]] || archives=true; done
if ${{archives:-false}}; then
  line='["git"'
  for word; do line+=", \\"$word\\""; done
  echo "$line]" >>"$FAKE_GCLOUD/calls.jsonl"
fi
exec {shlex.quote(shutil.which("git"))} "$@" """,
        )
        return self

    def _program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def start(self, *args: str, **env: str) -> subprocess.Popen:
        """The script, going on in the background."""
        return subprocess.Popen(
            ["bash", str(self.checkout / "scripts" / "tpu_pod.sh"), *args],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        """The script, to its end."""
        process = self.start(*args, **env)
        try:
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"the script hangs\n{out}\n{err}")
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def calls(self, *verbs: str) -> list[list[str]]:
        """What was run outside, in order; with `verbs`, only what has one of those words."""
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if not verbs or set(verbs) & set(line)]

    def on_workers(self, sub_command: str) -> list[list[str]]:
        """Calls of ssh that give tpu_worker.sh this sub-command."""
        wanted = f"tpu_worker.sh {sub_command}"
        return [call for call in self.calls("ssh") if any(wanted in word for word in call)]

    def sources(self) -> list[pathlib.Path]:
        """Where the job runs, on each worker."""
        return sorted(self.folder.glob("workers/*/deevisum_jax/source"))


@pytest.fixture
def bare(checkout, tmp_path):
    """The script on a machine without gcloud."""
    return Pod(checkout, tmp_path)


@pytest.fixture
def pod(bare):
    """The script with the false gcloud; what still runs on the workers is killed at the end."""
    yield bare.with_gcloud()
    for path in bare.folder.glob("workers/*/deevisum_jax/job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def made_once(checkout, tmp_path_factory) -> pathlib.Path:
    """A slice with two workers that is ready and installed."""
    pod = Pod(checkout, tmp_path_factory.mktemp("made")).with_gcloud()
    for args in (("up", *AT, *TYPE), ("install", *AT)):
        done = pod(*args)
        assert done.returncode == 0, done.stderr
    return pod.folder


@pytest.fixture
def installed(made_once, pod):
    """Such a slice for one test."""
    shutil.copy(made_once / "slice.json", pod.folder)
    shutil.copytree(made_once / "workers", pod.folder / "workers")
    return pod


def wait_for(path: pathlib.Path) -> None:
    """Until a job has written `path`."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


# ---- A dry run ----


@pytest.mark.parametrize(
    "args",
    [
        ("launch", *AT, *TYPE, *MAIN, "--config.eval.f1=it's 'max'"),
        ("launch", *AT, *TYPE, *MAIN, "--spot", "--queued", "--keep_alive", "--delete_after"),
        ("up", *AT, *TYPE, "--project", "my-project"),
        ("down", *AT),
    ],
    ids=["on_demand", "queued_spot", "up", "down_absent"],
)
def test_dry_run_prints_the_commands_that_a_real_run_runs(pod, tmp_path_factory, args):
    bare = Pod(pod.checkout, tmp_path_factory.mktemp("bare"))
    dry = bare(*args, "--dry_run")
    assert (dry.returncode, dry.stderr) == (0, "")
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    real = pod(*args)
    assert real.returncode == 0, real.stderr
    if args[0] == "down":  # a dry run takes it that there is something to delete
        assert printed.pop()[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "delete"]
    assert printed == pod.calls()


def test_dry_run_tells_values_with_spaces_as_a_shell_wants_them(bare):
    dry = bare("launch", *AT, *TYPE, *MAIN, "--config.eval.f1=it's 'max'", "--dry_run")
    start = next(line for line in dry.stdout.splitlines() if "tpu_worker.sh start" in line)
    (remote,) = [word for word in shlex.split(start) if "tpu_worker.sh" in word]
    assert shlex.split(remote)[-1] == "--config.eval.f1=it's 'max'"


def test_dry_run_shows_the_deletion_after_a_refused_job(bare):
    dry = bare("run", *AT, "--dry_run", "--delete_after", "--", "python", "x.py", "--out", "here")
    assert dry.returncode == 2
    assert "tpu-vm delete first" in dry.stdout.splitlines()[-1]
    assert "not deleted" not in dry.stderr


# ---- The slice ----


def test_launch_runs_the_main_job_on_all_workers_with_its_words_intact(pod):
    done = pod("launch", *AT, *TYPE, *MAIN, "--config.eval.f1=it's 'max'  $HOME", "--delete_after")
    assert done.returncode == 0, done.stderr
    assert "exit 0" in done.stdout  # worker 0's log
    assert not (pod.folder / "slice.json").exists()


def test_run_gives_every_worker_the_same_words(installed):
    done = installed("run", *AT, *MAIN, "--config.eval.f1=it's 'max'  $HOME")
    assert done.returncode == 0, done.stderr
    expected = [
        *("-m", "deevisum_jax.main", "--config", "configs/quickstart.py"),
        *("--workdir", "gs://bucket/first", "--config.eval.f1=it's 'max'  $HOME"),
    ]
    for worker in (0, 1):
        log = installed.folder / "workers" / str(worker) / "python.log"
        assert log.read_text().split("\n")[-len(expected) - 1 : -1] == [f"<{w}>" for w in expected]


def test_install_brings_the_committed_code_and_both_extras(made_once):
    home = made_once / "workers" / "1"
    assert (home / "deevisum_jax" / "source" / "configs" / "quickstart.py").is_file()
    made, filled = (home / "uv.log").read_text().splitlines()
    assert made == f"uv venv --quiet --clear --python 3.12 {home}/deevisum_jax/venv"
    assert filled.endswith(f"--editable {home}/deevisum_jax/source[tpu,gcs]")


def test_install_says_which_changes_are_not_committed(installed):
    note = installed.checkout / "note.txt"
    note.write_text("new")
    try:
        done = installed("install", *AT)
    finally:
        note.unlink()
    assert done.returncode == 0
    assert "without these changes:\n?? note.txt" in done.stderr


def test_a_slice_that_is_there_is_used_again(installed):
    done = installed("up", *AT, *TYPE)
    assert done.returncode == 0
    assert "used again" in done.stderr
    assert installed.calls("create", "delete") == []


def test_a_slice_of_another_type_is_refused(installed):
    done = installed("up", *AT, "--accelerator_type", "v5p-16")
    assert done.returncode == 2
    assert "it is v5litepod-16, --accelerator_type says v5p-16" in done.stderr
    assert installed.calls("create", "delete") == []


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-384", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_every_accelerator_gets_its_own_image(bare, accelerator, runtime):
    dry = bare("up", *AT, "--accelerator_type", accelerator, "--dry_run")
    assert f"--accelerator-type {accelerator} --version {runtime} " in dry.stdout


def test_queued_waits_until_the_slice_is_given(pod):
    states = "CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    done = pod("up", *AT, *TYPE, "--queued", "--spot", FAKE_QUEUE=states)
    assert done.returncode == 0, done.stderr
    (create,) = pod.calls("create")
    assert create[3:5] == ["queued-resources", "create"]
    assert "--spot" in create
    assert [line.split()[-1] for line in done.stderr.splitlines() if "first': " in line] == [
        *states.split()
    ]


def test_a_queue_that_fails_is_an_error(pod):
    done = pod("up", *AT, *TYPE, "--queued", FAKE_QUEUE="WAITING_FOR_RESOURCES FAILED")
    assert done.returncode == 1
    assert "queued-resources describe first" in done.stderr


def test_a_queue_that_failed_before_is_replaced(pod):
    pod("up", *AT, *TYPE, "--queued", FAKE_QUEUE="FAILED")
    done = pod("up", *AT, *TYPE, "--queued")
    assert done.returncode == 0, done.stderr
    assert len(pod.calls("create")) == 2
    assert len(pod.calls("delete")) == 1


def test_down_deletes_a_queued_resource_with_its_slice(pod):
    assert pod("up", *AT, *TYPE, "--queued").returncode == 0
    assert pod("down", *AT).returncode == 0  # --queued need not be said again
    assert not (pod.folder / "queue.json").exists()
    assert not (pod.folder / "slice.json").exists()
    again = pod("down", *AT)
    assert again.returncode == 0
    assert "nothing to delete" in again.stderr


def test_a_slice_that_a_waiting_queue_did_not_give_is_deleted_with_it(pod):
    assert pod("up", *AT, *TYPE).returncode == 0
    queue = {"states": ["WAITING_FOR_RESOURCES"], "type": TYPE[1], "given": False}
    (pod.folder / "queue.json").write_text(json.dumps(queue))
    assert pod("down", *AT).returncode == 0
    assert not (pod.folder / "queue.json").exists()
    assert not (pod.folder / "slice.json").exists()


def test_a_slice_is_not_made_beside_a_queue_that_would_bring_a_second(pod):
    queue = {"states": ["WAITING_FOR_RESOURCES"], "type": TYPE[1], "given": False}
    (pod.folder / "queue.json").write_text(json.dumps(queue))
    refused = pod("up", *AT, *TYPE)
    assert refused.returncode == 2
    assert "is in line (WAITING_FOR_RESOURCES)" in refused.stderr
    assert pod.calls("create", "delete") == []


def test_a_delete_that_fails_is_tried_again(installed):
    (installed.folder / "no_delete").write_text("2")
    done = installed("down", *AT)
    assert done.returncode == 0
    assert done.stderr.count("not deleted yet; next attempt") == 2
    assert not (installed.folder / "slice.json").exists()


@pytest.mark.parametrize("args", [("down", *AT), ("run", *AT, "--delete_after", "--", "true")])
def test_a_delete_that_never_works_is_told_with_the_command(installed, args):
    (installed.folder / "no_delete").touch()
    done = installed(*args)
    assert done.returncode == 1
    assert "NOT DELETED. Slice 'first' may be STILL THERE AND BILLED" in done.stderr
    assert "scripts/tpu_pod.sh down --name first --zone us-west4-a" in done.stderr


def test_the_slice_is_deleted_even_where_the_queue_cannot_be_seen(installed):
    (installed.folder / "no_describe_queue").touch()
    done = installed("down", *AT)
    assert done.returncode == 1  # a queue may be left, and bring another
    assert not (installed.folder / "slice.json").exists()


def test_status_shows_slice_queue_and_workers(installed):
    shown = installed("status", *AT).stdout.splitlines()
    host = os.uname().nodename
    assert shown == [
        "queued resource: ABSENT",
        "slice: READY v5litepod-16 2 hosts",
        f"@worker {host} none",
        f"@worker {host} none",
    ]


def test_status_shows_the_workers_that_answer_beside_one_that_does_not(installed):
    (installed.folder / "unreachable").write_text("0")
    shown = installed("status", *AT).stdout.splitlines()
    assert shown[2:] == [f"@worker {os.uname().nodename} none"]


# ---- The job ----


def test_a_worker_starts_again_where_a_job_saved_on_a_notice(installed):
    script = 'echo x >>"$HOME/tries"; [[ $(wc -l <"$HOME/tries") -ge 3 ]] || exit 75'
    done = installed("run", *AT, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": exit 75\n") == 2
    assert len(installed.on_workers("start")) == 1


def _taken_away(pod: Pod, code: int) -> str:
    """A job whose slice is taken away at its first attempt."""
    mark = shlex.quote(str(pod.folder / "taken"))
    state = shlex.quote(str(pod.folder / "slice.json"))
    return (
        f"if mkdir {mark}; then sed -i s/READY/PREEMPTED/ {state}; exit {code}; fi; "
        f"until [[ -e {mark} ]]; do sleep 0.05; done"
    )


@pytest.mark.parametrize("code", [75, 1, 134])
def test_keep_alive_gets_another_slice_and_goes_on(installed, code):
    script = _taken_away(installed, code)
    args = ("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    done = installed(*args)
    assert done.returncode == 0, done.stderr
    verbs = [call[4] for call in installed.calls("create", "delete", "scp")]
    assert verbs == ["delete", "create", "scp"]
    first, second = installed.on_workers("start")
    assert first == second


def test_keep_alive_queues_again_for_a_queued_slice(pod):
    assert pod("up", *AT, *TYPE, "--queued", "--spot").returncode == 0
    assert pod("install", *AT).returncode == 0
    script = _taken_away(pod, 75)
    done = pod(
        *("run", *AT, *TYPE, "--queued", "--spot", "--keep_alive", "--", "bash", "-c", script),
        FAKE_QUEUE="WAITING_FOR_RESOURCES ACTIVE",
    )
    assert done.returncode == 0, done.stderr
    calls = [call[3:5] for call in pod.calls("create", "delete")]
    queued = "queued-resources"
    assert calls == [[queued, "create"], [queued, "delete"], [queued, "create"]]


def test_without_keep_alive_a_lost_slice_is_75_and_nothing_is_bought(installed):
    done = installed("run", *AT, "--", "bash", "-c", _taken_away(installed, 75))
    assert done.returncode == 75
    assert "taken away (PREEMPTED)" in done.stderr
    assert "--keep_alive" in done.stderr
    assert installed.calls("create", "delete") == []


def test_a_mistake_stops_all_workers_and_is_not_repeated(installed):
    # One worker refuses, the other would wait for it for ever.
    script = f"mkdir {installed.folder}/refused && exit 2; exec sleep 600"
    done = installed("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    assert done.returncode == 2
    assert "refused what it was given" in done.stderr
    assert len(installed.on_workers("start")) == 1
    states = installed("status", *AT).stdout.split("\n")[2:4]
    assert sorted(line.split(maxsplit=2)[2] for line in states) == ["exited 2", "stopped"]


def test_who_waited_in_vain_for_a_lost_worker_has_made_no_mistake(installed):
    script = f'mkdir "$HOME/again" || exit 0; mkdir {installed.folder}/lost && kill -KILL 0; exit 2'
    done = installed("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert len(installed.on_workers("start")) == 2


def test_a_crash_is_not_repeated(installed):
    done = installed("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", "echo oh no; exit 9")
    assert done.returncode == 9
    assert "oh no" in done.stdout
    assert len(installed.on_workers("start")) == 1


def test_a_worker_that_failed_does_not_end_the_others(installed):
    """They may not need it: each process of a corpus has videos of its own."""
    script = (
        f"mkdir {installed.folder}/failed && exit 1; "
        f"for tries in {{1..30}}; do sleep 0.05; done; touch {installed.folder}/other_is_done"
    )
    done = installed("run", *AT, "--", "bash", "-c", script)
    assert done.returncode == 1
    assert (installed.folder / "other_is_done").exists()
    assert installed.on_workers("stop") == []


def test_keep_alive_starts_again_what_ended_without_a_word(installed):
    script = 'mkdir "$HOME/once" && kill -KILL 0; exit 0'
    done = installed("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert " lost" in done.stderr
    assert installed.calls("create", "delete", "scp") == []


def test_hosts_that_ended_with_0_and_1_are_not_waited_for(installed):
    script = f"mkdir {installed.folder}/failed && exit 1; exit 0"
    args = ("run", *AT, "--", "bash", "-c", script)
    done = installed(*args, TPU_POD_GRACE_S="1000")
    assert done.returncode == 1
    assert "ended, on 1 of 2 hosts with exit status 1" in done.stderr


# In a job: until it was started everywhere and is followed. (It does not find itself in the calls.)
_FOLLOWED = 'until grep -q "tpu_worker.sh lo[g]" "$FAKE_GCLOUD/calls.jsonl"; do sleep 0.05; done'


def test_a_host_that_does_not_answer_any_more_ends_a_job_that_runs_nowhere_else(installed):
    script = (
        f'[[ $HOME != */1 ]] || {{ {_FOLLOWED}; echo 1 >"{installed.folder}/unreachable"; '
        f"exec sleep 600; }}; "
        f'until [[ -e "{installed.folder}/unreachable" ]]; do sleep 0.05; done'
    )
    done = installed("run", *AT, "--delete_after", "--", "bash", "-c", script)
    assert done.returncode == 75
    assert "1 of 2 hosts do not answer: ssh: connect to host 1" in done.stderr
    assert not (installed.folder / "slice.json").exists()


def test_hosts_that_all_do_not_answer_end_the_job(installed):
    script = f'{_FOLLOWED}; echo 0 1 >"{installed.folder}/unreachable"; exec sleep 600'
    done = installed("run", *AT, "--", "bash", "-c", script)
    assert done.returncode == 75
    assert "2 of 2 hosts do not answer" in done.stderr


def test_a_host_that_does_not_answer_for_a_while_ends_nothing(installed):
    """Worker 0 waits until its state has been asked for three times, by the calls noted."""
    unreachable = f"{installed.folder}/unreachable"
    script = (
        f'[[ $HOME != */0 ]] || {{ {_FOLLOWED}; echo 1 >"{unreachable}"; '
        f'until (( $(grep -c "tpu_worker.sh stat[e]" "$FAKE_GCLOUD/calls.jsonl") > 2 )); '
        f'do sleep 0.05; done; rm "{unreachable}"; }}'
    )
    done = installed("run", *AT, "--", "bash", "-c", script, TPU_WORKER_LOG_S="0")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 hosts do not answer" in done.stderr


def test_what_gcloud_cannot_say_for_a_moment_does_not_end_the_job(installed):
    script = f"mkdir {installed.folder}/failed && exit 9; echo 2 >{installed.folder}/no_describe"
    done = installed("run", *AT, "--", "bash", "-c", script)
    assert done.returncode == 9, done.stderr


def test_stop_lets_the_job_save_and_ends_run(installed):
    # Bash runs the trap only between commands, hence the short sleeps.
    script = 'trap "echo saved >saved; exit 75" TERM; touch ready; while :; do sleep 0.05; done'
    running = installed.start("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    try:
        sources = installed.sources()
        for source in sources:
            wait_for(source / "ready")
        stopped = installed("stop", *AT)
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert stopped.stdout.count("stopped on") == 2
    assert [(source / "saved").read_text() for source in sources] == ["saved\n"] * 2
    assert running.returncode == 130
    assert "the job was stopped" in err


def test_a_job_outlives_who_follows_it_and_log_shows_it_from_the_start(installed):
    script = "echo begin; until [[ -e go ]]; do sleep 0.05; done; echo end"
    running = installed.start("run", *AT, "--", "bash", "-c", script)
    sources = installed.sources()
    try:
        while running.stdout.readline() != "begin\n":
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert "no longer following; the job goes on" in err
    for source in sources:
        (source / "go").touch()
    done = installed("log", *AT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["begin", "end"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_ends_the_command_is_told_that_nothing_will_be_deleted(installed, number):
    script = "echo begin; until [[ -e go ]]; do sleep 0.05; done"
    running = installed.start("run", *AT, "--delete_after", "--", "bash", "-c", script)
    try:
        while running.stdout.readline() != "begin\n":
            assert running.poll() is None
        running.send_signal(number)
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert "--delete_after does not hold any more: nothing will be deleted" in err
    assert "kept and billed; to delete it: scripts/tpu_pod.sh down --name first" in err
    assert installed.calls("delete") == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pod: (pod.folder / "no_copy").touch(), "cannot be copied"),
        (
            lambda pod: (pod.folder / "worker_bin" / "python3").write_text("exit 1\n"),
            "the installation failed",
        ),
        (
            lambda pod: (pod.folder / "unreachable").write_text("1"),
            "the installation failed",
        ),
    ],
    ids=["copy", "install", "unreachable"],
)
def test_delete_after_deletes_a_slice_on_which_nothing_could_be_started(pod, break_it, message):
    break_it(pod)
    done = pod("launch", *AT, *TYPE, *MAIN, "--delete_after")
    assert done.returncode == 1
    assert message in done.stderr
    assert len(pod.calls("create")) == 1
    assert not (pod.folder / "slice.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--", "python", "x.py", "--out", "here"), "each of the 2 hosts"),
        (("--", "true"), "nothing is installed"),
    ],
    ids=["workdir", "not_installed"],
)
def test_delete_after_deletes_when_the_job_is_refused(pod, args, message):
    assert pod("up", *AT, *TYPE).returncode == 0
    done = pod("run", *AT, "--delete_after", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (pod.folder / "slice.json").exists()


def test_without_delete_after_the_end_of_a_failed_launch_says_what_is_billed(pod):
    (pod.folder / "no_copy").touch()
    done = pod("launch", *AT, *TYPE, *MAIN)
    assert done.returncode == 1
    assert "slice 'first' is kept and billed; to delete it: scripts/tpu_pod.sh down" in done.stderr
    assert pod.calls("delete") == []


def test_delete_after_leaves_a_slice_of_another_type_alone(installed):
    done = installed("launch", *AT, "--accelerator_type", "v5p-16", *MAIN, "--delete_after")
    assert done.returncode == 2
    assert installed.calls("delete") == []


def test_delete_after_leaves_a_slice_alone_whose_job_cannot_be_seen(installed):
    (installed.folder / "unreachable").write_text("1")
    done = installed("launch", *AT, *TYPE, *MAIN, "--delete_after")
    assert done.returncode == 1
    assert "not known whether a job runs there: ssh: connect to host 1" in done.stderr
    assert "is kept and billed" in done.stderr
    assert installed.calls("delete", "scp") == []


def test_keep_alive_repeats_an_installation_that_fails(installed):
    (installed.folder / "no_copy").write_text("2")
    script = _taken_away(installed, 75)
    done = installed("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert [call[4] for call in installed.calls("create", "delete", "scp")] == [
        *("delete", "create", "scp", "scp", "scp")
    ]


def test_keep_alive_waits_for_a_slice_in_a_state_of_its_own(installed):
    """It is HIDING when the job ends, and taken away later."""
    slice_file = installed.folder / "slice.json"
    script = (
        f"if mkdir {installed.folder}/once; then sed -i s/READY/HIDING/ {slice_file}; exit 75; fi; "
        f"until [[ -e {installed.folder}/once ]]; do sleep 0.05; done"
    )
    args = ("run", *AT, *TYPE, "--keep_alive", "--", "bash", "-c", script)
    running = installed.start(*args, TPU_POD_RETRY_S="0.1")
    try:
        while "no slice to go on with yet" not in (line := running.stderr.readline()):
            assert line, "it has ended"
        slice_file.write_text(slice_file.read_text().replace("HIDING", "PREEMPTED"))
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, err


def test_who_asks_for_the_state_is_not_taken_for_a_job(installed):
    assert installed("run", *AT, "--", "true").returncode == 0
    lock = installed.folder / "workers" / "0" / "deevisum_jax" / "job" / "lock"
    host = os.uname().nodename
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        shown = installed("status", *AT).stdout.splitlines()
    assert shown[2:] == [f"@worker {host} exited 0"] * 2


def test_a_job_starts_although_its_state_is_asked_for(installed):
    assert installed("run", *AT, "--", "true").returncode == 0
    job = installed.folder / "workers" / "0" / "deevisum_jax" / "job"
    with (job / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        running = installed.start("run", *AT, "--", "echo", "again")
        try:
            while "again" not in (job / "command").read_text():
                assert running.poll() is None
                time.sleep(0.02)
            time.sleep(0.3)  # by then it has asked for the lock itself
            fcntl.flock(held, fcntl.LOCK_UN)
            out, err = running.communicate(timeout=30)
        finally:
            running.kill()
            running.communicate()
    assert running.returncode == 0, err
    assert "again" in out


def test_what_a_job_leaves_behind_is_no_running_job(installed):
    script = 'sleep 600 >/dev/null 2>&1 & echo $! >"$HOME/left"'
    try:
        done = installed("run", *AT, "--", "bash", "-c", script)
    finally:
        for path in installed.folder.glob("workers/*/left"):
            os.kill(int(path.read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stderr


def test_the_same_command_follows_a_running_job_and_another_is_refused(installed):
    script = "touch ready; until [[ -e go ]]; do sleep 0.05; done"
    job = ("--", "bash", "-c", script)
    running = installed.start("run", *AT, *job)
    sources = installed.sources()
    try:
        for source in sources:
            wait_for(source / "ready")
        other = installed("run", *AT, "--delete_after", "--", "bash", "-c", "true")
        changed = installed("install", *AT)
        same = installed.start("run", *AT, *job)
        while "already running" not in same.stdout.readline():
            assert same.poll() is None
        for source in sources:
            (source / "go").touch()
        for follower in (running, same):
            follower.communicate(timeout=30)
    finally:
        for follower in (running, same):
            follower.kill()
            follower.communicate()
    assert other.returncode == 2
    assert "another job is running" in other.stderr
    assert installed.calls("delete") == []
    assert changed.returncode == 1
    assert "end it first" in changed.stderr
    assert (running.returncode, same.returncode) == (0, 0)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("lunch", *AT), "unknown sub-command 'lunch'; choose one of launch, up"),
        (("up", *AT, *TYPE, "--spt"), "unknown flag '--spt'"),
        (("up", *AT, "v5p-8"), "unknown flag 'v5p-8'"),
        (("up", "--zone", "us-west4-a", *TYPE), "--name is missing"),
        (("up", "--name", "First_run", "--zone", "us-west4-a", *TYPE), "lower-case letters"),
        (("up", "--name", "first", *TYPE), "--zone is missing, such as"),
        (("up", "--name", "first", "--zone", "us-west4", *TYPE), "is no zone; it looks like"),
        (("up", *AT), "--accelerator_type is missing, such as"),
        (("up", *AT, "--accelerator_type"), "--accelerator_type needs a value"),
        (("up", *AT, "--accelerator_type", "v5e-16"), "v5litepod-N  (v5e)"),
        (("up", *AT, "--accelerator_type", "v5p-24"), "v5p-N, v4-N"),
        (("up", *AT, "--accelerator_type", "v4-12288"), "up to 12288 (v5p), 8192 (v4)"),
        (("up", *AT, *TYPE, *MAIN), "up starts no job"),
        (("up", *AT, *TYPE, "--keep_alive"), "for run and launch, not for up"),
        (("run", *AT, "--keep_alive", *MAIN), "--accelerator_type is missing"),
        (("run", *AT), "--config is missing"),
        (("run", *AT, "--config", "configs/quickstart.py"), "--workdir is missing, such as"),
        (("run", *AT, *MAIN, "--config.total_steps"), "write overrides as"),
        (("run", *AT, *MAIN, "--", "true"), "both a command behind -- and"),
        (("run", *AT, "--"), "nothing after --"),
        (("run", *AT, "--", "--config", "x"), "give a whole command"),
        (
            ("run", *AT, "--config", "mine.py", "--workdir", "gs://b/x"),
            "'mine.py' is not committed",
        ),
        (
            ("launch", *AT, *TYPE, *MAIN[:2], "--workdir", "runs/first"),
            "each of the 4 hosts on its own; give a bucket",
        ),
        (
            ("launch", *AT, *TYPE, "--", "python", "x.py", "--out=/tmp/x"),
            "each of the 4 hosts on its own; give a bucket",
        ),
        (
            ("launch", *AT, *TYPE, "--", "python", "x.py", "--checkpoint", "runs/x"),
            "--checkpoint 'runs/x' would be on the disk of each of the 4 hosts",
        ),
        (
            ("launch", *AT, *TYPE, "--", "python", "x.py", "--manifest=videos.csv"),
            "--manifest 'videos.csv' would be on the disk of each of the 4 hosts",
        ),
    ],
)
def test_a_mistake_is_told_before_gcloud_is_asked(pod, args, message):
    done = pod(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (pod.folder / "calls.jsonl").exists()


def test_one_host_may_have_a_folder_of_its_own(bare):
    one = ("--accelerator_type", "v5litepod-8", *MAIN[:2], "--workdir", "runs/first")
    assert bare("launch", *AT, *one, "--dry_run").returncode == 0


def test_a_folder_is_refused_as_soon_as_the_hosts_are_known(installed):
    done = installed("run", *AT, *MAIN[:2], "--workdir", "runs/first")
    assert done.returncode == 2
    assert "each of the 2 hosts" in done.stderr
    assert installed.on_workers("start") == []


def test_no_gcloud(bare):
    done = bare("status", *AT)
    assert done.returncode == 2
    assert "gcloud is not installed; see https://" in done.stderr


def test_not_logged_in(pod):
    done = pod("status", *AT, FAKE_ACCOUNT="")
    assert done.returncode == 2
    assert "first: gcloud auth login" in done.stderr


def test_no_right_to_the_project(pod):
    (pod.folder / "no_describe").touch()
    done = pod("up", *AT, *TYPE)
    assert done.returncode == 1
    assert "gcloud services enable tpu.googleapis.com" in done.stderr
    assert "PERMISSION_DENIED" in done.stderr
    assert pod.calls("create") == []


@pytest.mark.parametrize("subcommand", ["install", "log", "stop"])
def test_a_slice_that_is_not_there_is_no_place_to_work(pod, subcommand):
    done = pod(subcommand, *AT)
    assert done.returncode == 2
    assert "slice 'first' in us-west4-a is ABSENT; first: tpu_pod.sh up" in done.stderr


def test_run_before_install(pod):
    assert pod("up", *AT, *TYPE).returncode == 0
    done = pod("run", *AT, *MAIN)
    assert done.returncode == 2
    assert "nothing is installed on 'first'; first: tpu_pod.sh install" in done.stderr


def test_an_installation_that_fails_says_so(pod):
    (pod.folder / "worker_bin" / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    done = pod("launch", *AT, *TYPE, *MAIN)
    assert done.returncode == 1
    assert "pip cannot install uv" in done.stderr
    assert pod.on_workers("start") == []


# ---- The scripts themselves ----


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent
    program = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed; the extra `test` brings it")
    scripts = sorted(map(str, (REPO / "scripts").glob("*.sh")))
    found = subprocess.run([program, *scripts], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
