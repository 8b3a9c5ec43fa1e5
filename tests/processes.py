"""Runs of several processes on this machine, each with simulated devices of its own."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deevisum_jax import distributed
from deevisum_jax.errors import exits_cleanly

REPO = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int  # negative: the signal that killed it
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that tell of an error, of ours or of another kind."""
        words = ("error:", "Error", "Traceback", "FATAL", "Check failure")
        return [line for line in self.err.splitlines() if any(word in line for word in words)]


def run(
    commands: Sequence[Sequence[str]],
    *,
    devices: int = 2,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> list[Ended]:
    """Runs a command per process, all at once, and waits; none outlives this call.

    Args:
      commands: one per process, behind the name of Python.
      devices: of each process.
      env: environment variables besides this process's own.
      timeout_s: after which all are killed and an error is raised.
    """
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": (
            # But for their number, as conftest.py has them, and for its reasons.
            f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
            " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        ),
        **(env or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        started, files = [], []
        deadline = time.monotonic() + timeout_s
        try:
            for i, command in enumerate(commands):
                paths = [pathlib.Path(folder, f"{i}.{name}") for name in ("out", "err")]
                # Files, since a pipe that nobody reads stops its writer.
                with paths[0].open("w") as out, paths[1].open("w") as err:
                    started.append(
                        subprocess.Popen(
                            [sys.executable, *command],
                            env=environment,
                            cwd=REPO,
                            stdout=out,
                            stderr=err,
                        )
                    )
                files.append(paths)
            for process in started:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            said = "\n".join(f"{err.name}:\n{err.read_text()[-2000:]}" for _, err in files)
            raise AssertionError(f"not all processes ended within {timeout_s} s\n{said}") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [
            Ended(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(started, files, strict=True)
        ]


def flags_of(count: int) -> list[list[str]]:
    """What tells every one of `count` processes who it is."""
    address = f"localhost:{free_port()}"
    return [
        ["--coordinator_address", address, "--num_processes", str(count), "--process_id", str(i)]
        for i in range(count)
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_main(flags: Sequence[Sequence[str]], **kwargs: Any) -> list[Ended]:
    """Runs the training program, one process per list of flags."""
    who = flags_of(len(flags))
    return run(
        [["-m", "deevisum_jax.main", *own, *given] for own, given in zip(who, flags, strict=True)],
        **kwargs,
    )


def run_function(count: int, name: str, *args: Any, **kwargs: Any) -> list[Ended]:
    """Runs a function of tests/process_work.py in `count` processes, connected as a command's are.

    What it returns in every process is the last line of `Ended.out`, as JSON.
    """
    command = ["-m", "tests.processes", name, json.dumps(args)]
    return run([[*command, *own] for own in flags_of(count)], **kwargs)


@exits_cleanly
@distributed.ends_together
def main() -> int:
    """One process of `run_function`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("args", type=json.loads)
    distributed.add_flags(parser)
    args = parser.parse_args()
    distributed.initialize(args)
    result = getattr(importlib.import_module("tests.process_work"), args.function)(*args.args)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
