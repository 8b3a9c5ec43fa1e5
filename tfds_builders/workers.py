"""Records made by several processes, one per CPU core, and handed over in order.

Fresh processes, `python -m MODULE JOB`: unlike those of multiprocessing they neither fork a caller
that may run JAX's threads nor import its main module, and MODULE needs import neither TFDS nor JAX.

    # in MODULE
    def main(argument: str) -> None:
        workers.serve(argument, lambda job, index: {"frames": [...], "n": 3, "audio": array})

    for record in workers.records(MODULE, {"seed": 1}, 10, lambda index: f"video {index}"):
        ...
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from deevisum_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]  # where the packages are imported from


def records(
    module: str, job: Mapping[str, Any], count: int, name: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    """Yields records 0 to count - 1 of a job.

    Args:
      module: what is run; it hands its argument to `serve`.
      job: what `make` is given there; plain values, as JSON has them.
      count: number of records.
      name: what a record is called when it fails.

    Raises:
      UserError: as raised in a worker; or a worker died, of a full disk for instance, and what it
        printed to stderr says why.
    """
    num_workers = min(num_cores(), count)
    workers = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for k in range(num_workers):
                share = {"job": job, "scratch": scratch, "indices": [k, count, num_workers]}
                workers.append(start(module, json.dumps(share)))
            for index in range(count):
                line = workers[index % num_workers].stdout.readline()
                if not line:
                    raise UserError(
                        f"the process that makes {name(index)} ended early; its own message is "
                        "above"
                    )
                answer = json.loads(line)
                if "error" in answer:
                    raise UserError(answer["error"])
                path = pathlib.Path(answer["record"])
                yield unpack(path)
                path.unlink()
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(module: str, argument: str) -> subprocess.Popen[str]:
    """Starts a worker, `python -m MODULE ARGUMENT`, that is heard and spoken to in lines."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, argument]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )


def serve(argument: str, make: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
    """A worker: makes its share of the records and prints where each lies.

    Args:
      argument: of the command line.
      make: given the job and an index, the record: `frames` a list of bytes, some numpy arrays, and
        plain values.
    """
    share = json.loads(argument)
    for index in range(*share["indices"]):
        path = pathlib.Path(share["scratch"]) / f"{index}.npz"
        try:
            pack(path, make(share["job"], index))
        except UserError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return
        print(json.dumps({"record": str(path)}), flush=True)


def pack(file: pathlib.Path | BinaryIO, record: Mapping[str, Any]) -> None:
    """Writes a record to one file that holds neither pickles nor code."""
    arrays = {name: value for name, value in record.items() if isinstance(value, np.ndarray)}
    plain = {
        name: value for name, value in record.items() if name not in arrays and name != "frames"
    }
    np.savez(
        file,
        **{f"array/{name}": value for name, value in arrays.items()},
        plain=np.frombuffer(json.dumps(plain).encode(), np.uint8),
        frames=np.frombuffer(b"".join(record["frames"]), np.uint8),
        frame_bytes=[len(frame) for frame in record["frames"]],
    )


def unpack_plain(path: pathlib.Path) -> dict[str, Any]:
    """The plain values alone of the record that `pack` has written; little is read for them."""
    # NumPy leaves a file open that it has opened and cannot read.
    with path.open("rb") as stream, np.load(stream) as stored:
        return json.loads(stored["plain"].tobytes())


def unpack(path: pathlib.Path) -> dict[str, Any]:
    """The record that `pack` has written."""
    with np.load(path) as stored:
        record = json.loads(stored["plain"].tobytes())
        ends = np.cumsum(stored["frame_bytes"], dtype=int)
        frames = stored["frames"].tobytes()
        record["frames"] = [
            frames[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        prefix = "array/"
        return record | {
            name.removeprefix(prefix): stored[name]
            for name in stored.files
            if name.startswith(prefix)
        }
