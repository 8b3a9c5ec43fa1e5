"""How commands end on a mistake of the person who gave them."""

import pytest

from deevisum_jax import errors
from deevisum_jax.errors import UserError, closest


def test_closest_names_the_nearest_choice():
    assert closest("lerning_rate", ["learning_rate", "warmup_steps"]) == (
        "did you mean 'learning_rate'?"
    )


def test_closest_lists_all_choices_when_none_is_near():
    assert closest("xyz", ["b", "a"]) == "choose one of a, b"


def test_a_user_error_becomes_a_message_and_status_2(capsys):
    @errors.exits_cleanly
    def command(argv: list[str]) -> int:
        """What it does."""
        raise UserError(f"{argv[0]} is wrong; these are right:\n  this\n  that")

    assert command(["it"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: it is wrong; these are right:\n  this\n  that\n"
    assert captured.out == ""
    assert command.__doc__ == "What it does."


def test_an_interrupt_is_no_traceback(capsys):
    @errors.exits_cleanly
    def command() -> int:
        raise KeyboardInterrupt

    assert command() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_success_and_errors_of_ours_pass_through():
    assert errors.exits_cleanly(lambda: 0)() == 0
    with pytest.raises(ZeroDivisionError):
        errors.exits_cleanly(lambda: 1 // 0)()
