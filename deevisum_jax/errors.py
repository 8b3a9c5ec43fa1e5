"""The one kind of error that a person caused and can mend, and how commands end on it."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

P = ParamSpec("P")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class UserError(ValueError):
    """What was given cannot be used; the message names the thing and the next step."""


def closest(name: str, choices: Iterable[str]) -> str:
    """A ready half-sentence that names the choice nearest to `name`, else lists them all."""
    choices = sorted(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]!r}?"
    return f"choose one of {', '.join(choices)}"


def exits_cleanly(main: Callable[P, int]) -> Callable[P, int]:
    """Wraps a command's `main`: what a person did ends in a message on stderr, not in a traceback.

    Exit status 2 for a `UserError`, 130 for Ctrl-C as shells have it.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return wrapped
