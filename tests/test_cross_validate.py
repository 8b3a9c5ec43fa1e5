"""The script that trains all folds: which commands it gives, and when it ends."""

import pytest

from deevisum_jax import datasets
from scripts import cross_validate as cross_validation
from tests.conftest import TINY_CONFIG


class Folds:
    """A data set that is divided in three."""

    def __init__(self, data):
        self.folds = ("a", "b", "c") if data.folds else ()


@pytest.fixture
def cross_validate(monkeypatch, tmp_path):
    """Runs the script with a status for each command; returns its own and the commands."""
    monkeypatch.setattr(datasets, "Dataset", Folds)

    def run(*flags, statuses=(0, 0, 0, 0)):
        commands, left = [], iter(statuses)
        monkeypatch.setattr(
            cross_validation.subprocess,
            "call",
            lambda command: commands.append(command[3:]) or next(left),
        )
        flags = ("--config", str(TINY_CONFIG), "--workdir", str(tmp_path), *flags)
        return cross_validation.main(flags), commands

    return run


def test_every_fold_is_trained_and_all_are_evaluated_together(cross_validate, tmp_path):
    status, commands = cross_validate("--config.data.folds=partition", "--config.total_steps=7")
    assert status == 0
    shared = ["--config", str(TINY_CONFIG), "--config.data.folds=partition"]
    shared.append("--config.total_steps=7")
    assert commands == [
        *(
            [*shared, f"--config.data.fold={fold}", f"--workdir={tmp_path}/fold_{fold}"]
            for fold in range(3)
        ),
        [*shared, "--mode=evaluate", "--workdir", str(tmp_path), "--predictions",
         f"{tmp_path}/fold_{{fold}}/predictions.npz"],
    ]  # fmt: skip


def test_a_fold_that_was_stopped_ends_the_cross_validation(cross_validate):
    status, commands = cross_validate("--config.data.folds=partition", statuses=(0, 75))
    assert (status, len(commands)) == (75, 2)


def test_without_folds_there_is_nothing_to_cross_validate(cross_validate, capsys):
    status, commands = cross_validate()
    assert (status, commands) == (2, [])
    assert "data.folds is empty; set --config.data.folds=partition" in capsys.readouterr().err
