"""How commands end on a mistake of the person who gave them."""

import errno

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


def test_a_preemption_notice_is_status_75(capsys):
    @errors.exits_cleanly
    def command() -> int:
        raise errors.PreemptedError("step 7 of 9 is done and saved")

    assert command() == 75
    assert capsys.readouterr().err == (
        "stopped by a preemption notice: step 7 of 9 is done and saved; the same command again "
        "goes on\n"
    )


def test_what_a_disk_refuses_is_a_message(capsys):
    @errors.exits_cleanly
    def command() -> int:
        with open("/dev/full", "wb", buffering=0) as file:
            return file.write(b"text")

    assert command() == 2
    assert "cannot be written or read (No space left on device)" in capsys.readouterr().err


def test_what_a_disk_refuses_is_told_to_other_processes_alike():
    assert errors.outcome(OSError(errno.ENOSPC, "No space left", "metrics.jsonl")) == (
        2, "metrics.jsonl cannot be written or read (No space left); mend that and give the same "
        "command again",
    )  # fmt: skip
    assert errors.outcome(OSError(errno.EPIPE, "Broken pipe")) == (
        1, "BrokenPipeError: [Errno 32] Broken pipe",
    )  # fmt: skip


def test_success_and_errors_of_ours_pass_through():
    assert errors.exits_cleanly(lambda: 0)() == 0
    with pytest.raises(ZeroDivisionError):
        errors.exits_cleanly(lambda: 1 // 0)()
