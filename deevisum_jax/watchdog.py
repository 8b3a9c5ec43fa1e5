"""Says when a step, its input or a save takes far longer than usual. Never stops anything."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator

_LOOKS_S = 1.0
# Far longer than usual: a step on a busy machine, a bucket's bad minute and a save that waits for
# the one before stay below.
_FACTOR, _AT_LEAST_S = 10.0, 30.0
# While nothing is usual yet. A first step compiles, which takes minutes for large models.
_FIRST_S = 600.0
_NUM_USUAL, _NUM_KEPT = 3, 101  # durations that make a usual one, and that it is taken from


@dataclasses.dataclass
class _Doing:
    what: str
    step: int
    since: float  # by the clock
    said_s: float = 0.0  # how long it had taken when it was last said


class Watchdog:
    """Watches one thread, of which it is told what it is doing, from another."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Watches while it is open.

        Args:
          say: gets a line to show.
          clock: seconds.
        """
        self._say, self._clock = say, clock
        self._taken: dict[str, collections.deque[float]] = {}
        self._doing: _Doing | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextlib.contextmanager
    def watching(self, what: str, step: int) -> Iterator[None]:
        """What is done inside counts as `what`, such as "input", of a step."""
        doing = _Doing(what, step, self._clock())
        with self._lock:
            assert self._doing is None, "one thing at a time"
            self._doing = doing
        try:
            yield
        finally:
            taken_s = self._clock() - doing.since
            with self._lock:
                self._doing = None
                self._taken.setdefault(what, collections.deque(maxlen=_NUM_KEPT)).append(taken_s)
            if doing.said_s:
                self._say(f"the {what} of step {step} is over, after {taken_s:.0f} s")

    def look(self) -> None:
        """Says it if what is being done takes far too long, and again at twice that time."""
        with self._lock:
            doing = self._doing
            if doing is None:
                return
            usual_s = self._usual_s(doing.what)
            so_far_s = self._clock() - doing.since
            limit_s = _FIRST_S if usual_s is None else max(_AT_LEAST_S, _FACTOR * usual_s)
            if so_far_s < max(limit_s, 2 * doing.said_s):
                return
            doing.said_s = so_far_s
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - so_far_s))
        usually = "" if usual_s is None else f"; usually it takes {usual_s:.2g} s"
        self._say(
            f"the {doing.what} of step {doing.step} has taken {so_far_s:.0f} s so far, since "
            f"{since}{usually}"
        )

    def _usual_s(self, what: str) -> float | None:
        taken = self._taken.get(what, ())
        return statistics.median(taken) if len(taken) >= _NUM_USUAL else None

    def _watch(self) -> None:
        while not self._closed.wait(_LOOKS_S):
            self.look()
