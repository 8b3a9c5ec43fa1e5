"""What a run does when it is told to stop: by a preemption notice (SIGTERM), or by Ctrl-C.

A notice reaches the processes of a run at different times, or only one of them. All have to stop at
the same place all the same, so they ask for it together, as they do all their work.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deevisum_jax.errors import PreemptedError

# Calls of `reached` until the answer is read, so that no device waits for its host. A notice ends
# training at most this many steps later than it could: little of the 30 s that clouds give.
_LAG = 2
# Launchers may pass a signal on to a process that has it already.
_REPEATED_S = 1.0


class Notice:
    """Listens while it is open, in the main thread.

    A notice ends what is being done by raising `PreemptedError`, so that nothing half-written
    stays. Inside of `deferred` it is only noted, until all processes ask for it by `reached`.
    A second signal ends this process at once, also where it waits for a device in vain.
    """

    def __init__(self) -> None:
        self._noticed = self._interrupted = self._is_deferred = False
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> Notice:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        threading.Thread(target=_end_at_the_second, args=(self._read_end,), daemon=True).start()
        self._previous_end = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_notice),
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt),
        }
        return self

    def __exit__(self, *_: object) -> None:
        # The same notice may still come again, or late to this one of many processes, which is
        # about to end and has to say so.
        if self._noticed or jax.distributed.is_initialized():
            self._previous[signal.SIGTERM] = _ignore
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_end)
        os.close(self._write_end)  # ends the thread

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """What is done inside asks `reached` itself, and is not ended by a notice."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def reached(self) -> bool:
        """Whether to stop here; true in every process at the same call, which all of them make.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed, and lost on its way.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        if jax.process_count() == 1:
            return self._noticed
        quiet, noticed = self._flags
        self._asked.append(_any(noticed if self._noticed else quiet))
        if len(self._asked) <= _LAG:
            return False
        return bool(np.asarray(self._asked.popleft()))

    @functools.cached_property
    def _flags(self) -> tuple[jax.Array, jax.Array]:
        """False and True on the devices of this process; what the others hold is up to them."""
        mesh = jax.sharding.get_mesh()
        split = NamedSharding(mesh, P(mesh.axis_names))
        made = [
            jax.make_array_from_process_local_data(
                split, np.full(len(mesh.local_devices), flag), (mesh.size,)
            )
            for flag in (False, True)
        ]
        return made[0], made[1]

    def _on_notice(self, number: int, frame: FrameType | None) -> None:
        if self._noticed:
            return  # passed on once more
        self._noticed = True
        if not self._is_deferred:
            raise PreemptedError("there was nothing to save")
        # Not `print`, in whose middle this may be.
        os.write(2, b"\nSIGTERM: stopping; a second one stops at once\n")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        # Where Python cannot raise, in a callback of the garbage collector for instance, it drops
        # the exception; `reached` has it then.
        self._interrupted = True
        raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    """Not `signal.SIG_IGN`, which programs started from here would inherit."""


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(jnp.any(flags), NamedSharding(mesh, P()))


def _end_at_the_second(read_end: int) -> None:
    """Reads the numbers of signals as they come, whatever the main thread is busy with."""
    first = None
    while number := os.read(read_end, 1):
        if number[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first >= _REPEATED_S:
            os._exit(128 + number[0])
    os.close(read_end)
