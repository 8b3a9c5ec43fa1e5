"""The one kind of error that a person caused and can mend, and how commands end on it."""

from __future__ import annotations

import difflib
import errno
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

P = ParamSpec("P")

EXIT_TRACEBACK = 1  # Python's own
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: launchers may start the same command again
EXIT_INTERRUPTED = 130  # 128 + SIGINT

# A disk that is full, over its quota, read-only or not ours: nothing that a traceback explains.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class UserError(ValueError):
    """What was given cannot be used; the message names the thing and the next step."""


class PreemptedError(BaseException):
    """A preemption notice ended the run; the message says what has been saved.

    No mistake, and nothing that a general `except Exception` should meet, as `KeyboardInterrupt`.
    """


def closest(name: str, choices: Iterable[str]) -> str:
    """A ready half-sentence that names the choice nearest to `name`, else lists them all."""
    choices = sorted(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]!r}?"
    return f"choose one of {', '.join(choices)}"


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that ends on `error`, and what is said of it.

    2 for a `UserError` or what a disk refuses, 75 for a preemption notice, 130 for Ctrl-C as shells
    have it, and 1 for what a traceback has to explain.
    """
    match error:
        case UserError():
            return EXIT_USER_ERROR, str(error)
        case OSError() if error.errno in _DISK_ERRORS:
            return EXIT_USER_ERROR, (
                f"{error.filename or 'a file'} cannot be written or read ({error.strerror}); mend "
                "that and give the same command again"
            )
        case PreemptedError():
            return EXIT_PREEMPTED, (
                f"stopped by a preemption notice: {error}; the same command again goes on"
            )
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
    return EXIT_TRACEBACK, f"{type(error).__name__}: {error}"


def exits_cleanly(main: Callable[P, int]) -> Callable[P, int]:
    """Wraps a command's `main`: what a person did ends in a message on stderr, not in a traceback.

    Its exit status is that of `outcome`.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BaseException as error:
            status, message = outcome(error)
            if status == EXIT_TRACEBACK:
                raise
            begin = "error: " if status == EXIT_USER_ERROR else ""
            print(f"{begin}{message}", file=sys.stderr)
            return status

    return wrapped
