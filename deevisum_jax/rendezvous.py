"""All processes of a run wait for each other before jax connects them.

jax ends a process whose others stay away, or whose port is taken, with an abort and a stack trace.
So they meet first, at the address that jax's coordinator will have: process 0 listens there until
all others have come, then lets them go on.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Iterable

from deevisum_jax.errors import UserError

_HELLO, _GO = "deevisum_jax process", "deevisum_jax go"
_TRY_AGAIN_S = 0.5
_ANSWER_S = 10.0  # for a line that is on its way
_TELL_AFTER_S = 20.0
_PORT_FREE_S = 30.0  # for a run before this one to be gone


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
      UserError: this is no HOST:PORT.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 2**16:
        raise UserError(
            f"coordinator address {address!r} is no HOST:PORT; give the address of process 0 and a "
            "free port there, such as 10.0.0.2:8476"
        )
    return found[1].strip("[]"), int(found[2])


def name_processes(indices: Iterable[int]) -> str:
    """Such as "process 1" or "processes 1, 3"."""
    indices = list(indices)
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def meet(address: str, size: int, index: int, timeout_s: float) -> None:
    """Returns when all processes have come.

    Args:
      address: HOST:PORT of process 0.
      size: number of processes.
      index: this one, below `size`.
      timeout_s: seconds to wait at most.

    Raises:
      UserError: one stays away, two say that they are the same, or the port is taken.
    """
    deadline = time.monotonic() + timeout_s
    host, port = split_address(address)
    if index:
        _come(host, port, size, index, deadline, timeout_s)
    else:
        with contextlib.ExitStack() as sockets:
            server = sockets.enter_context(_listen(port, time.monotonic() + _PORT_FREE_S))
            _wait_for_all(sockets, server, address, size, deadline, timeout_s)


def _listen(port: int, deadline: float) -> socket.socket:
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
                )
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"port {port} of this machine cannot be had ({error.strerror}); give the "
                    "coordinator another one, in every process"
                ) from None
        time.sleep(_TRY_AGAIN_S)


def _wait_for_all(
    sockets: contextlib.ExitStack,
    server: socket.socket,
    address: str,
    size: int,
    deadline: float,
    timeout_s: float,
) -> None:
    tell_at = min(time.monotonic() + _TELL_AFTER_S, deadline)
    server.settimeout(_TRY_AGAIN_S)
    there: dict[int, socket.socket] = {}
    problem = ""
    while not problem:
        there = {other: peer for other, peer in there.items() if not _has_gone(peer)}
        if len(there) == size - 1:
            break
        missing = name_processes(i for i in range(1, size) if i not in there)
        if time.monotonic() > deadline:
            problem = (
                f"{missing} of {size} did not come to {address} within {timeout_s:.0f} s; start "
                "all of them, and let them reach that port"
            )
            break
        if tell_at < deadline and time.monotonic() > tell_at:
            print(f"waiting for {missing} of {size} at {address}", file=sys.stderr)
            tell_at = deadline
        try:
            peer = sockets.enter_context(server.accept()[0])
        except TimeoutError:
            continue
        hello = re.fullmatch(rf"{_HELLO} (\d+) of (\d+)", _read_line(peer, _ANSWER_S))
        if hello is None:
            continue  # somebody who looks which ports are open
        other, their_size = int(hello[1]), int(hello[2])
        if their_size != size:
            problem = (
                f"process 0 was started as one of {size}, process {other} as one of {their_size}; "
                "start all with the same number of processes"
            )
        elif other in there and not _has_gone(there[other]):
            problem = f"two processes say that they are process {other}; give each its own number"
        if problem:
            _write_line(peer, problem)
        else:
            there[other] = peer
    for peer in there.values():
        _write_line(peer, problem or _GO)
    if problem:
        raise UserError(problem)


def _come(host: str, port: int, size: int, index: int, deadline: float, timeout_s: float) -> None:
    why = "no answer"
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left_s, _ANSWER_S)) as peer:
                _write_line(peer, f"{_HELLO} {index} of {size}")
                answer = _read_line(peer, left_s + _ANSWER_S)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if answer == _GO:
                return
            if answer:
                raise UserError(answer)
            why = "something else answers there"  # or a run before this one that is about to end
        time.sleep(min(_TRY_AGAIN_S, left_s))
    raise UserError(
        f"process {index} of {size} could not reach process 0 at {host}:{port} within "
        f"{timeout_s:.0f} s ({why}); start process 0, check the address, and open the port"
    )


def _has_gone(peer: socket.socket) -> bool:
    """Whether the other end was closed, as when a process that said hello was killed."""
    peer.settimeout(0.0)
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(_ANSWER_S)


def _read_line(peer: socket.socket, timeout_s: float) -> str:
    """One line of text; "" if none comes."""
    peer.settimeout(timeout_s)
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < 2**16:
            received = peer.recv(4096)
            if not received:
                return ""
            line += received
    return line.decode("utf-8", "replace").removesuffix("\n") if line.endswith(b"\n") else ""


def _write_line(peer: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # who has gone need not be told
        peer.sendall(line.encode() + b"\n")
