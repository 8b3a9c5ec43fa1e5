"""Whose folder it is, and what is in it."""

import dataclasses
import json
import pathlib

import pytest

from deevisum_jax import distributed, experiment, files, initialization, runs
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import PreemptedError, UserError
from tests.checkpoint_files import claim, with_checkpoint


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_new_folder_is_made_and_the_same_run_may_come_back(tmp_path, tiny_config):
    workdir = tmp_path / "runs" / "first"
    assert claim(workdir, tiny_config()) == tiny_config()
    with_checkpoint(workdir)
    assert claim(workdir, tiny_config()) == tiny_config()
    # The mesh, the pace of validation and the like change no trained number.
    changed = tiny_config("mesh.fsdp=4", "mesh.data=1", "eval.every_steps=8", "log_every=9")
    assert claim(workdir, changed) == changed


def test_a_run_of_another_config_is_refused_and_left_alone(tmp_path, tiny_config):
    claim(tmp_path, tiny_config())
    with_checkpoint(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds a run of another config") as caught:
        claim(tmp_path, tiny_config("seed=1", "optim.learning_rate=3.0", "log_every=7"))
    assert "seed: 1 -> 0" not in str(caught.value)
    assert "set back seed: 0 -> 1; optim.learning_rate: 0.01 -> 3.0" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_mistake_before_the_first_checkpoint_does_not_take_the_folder(tmp_path, tiny_config):
    claim(tmp_path, tiny_config("data.vocab_size=300"))
    (tmp_path / "tokenizer.model").write_bytes(b"of the other config")
    claim(tmp_path, tiny_config("data.vocab_size=300"))
    assert (tmp_path / "tokenizer.model").exists()
    assert claim(tmp_path, tiny_config("seed=1")) == tiny_config("seed=1")
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path, tiny_config):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="is not empty and holds no run of ours"):
        claim(tmp_path, tiny_config())
    assert contents(tmp_path) == {"thesis.tex": b"all of it"}


def test_a_folder_with_a_config_that_is_not_ours_is_refused(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text("{not ours}")
    with pytest.raises(UserError, match="is not the config of a run"):
        claim(tmp_path, tiny_config())
    assert contents(tmp_path) == {"config.json": b"{not ours}"}


def test_a_kill_while_the_config_was_written_is_no_obstacle(tmp_path, tiny_config):
    (tmp_path / ".config.json.partial").write_text("{")
    assert claim(tmp_path, tiny_config()) == tiny_config()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, tiny_config, below):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(UserError, match="cannot be written"):
        claim(tmp_path / "file" / below, tiny_config())
    assert contents(tmp_path) == {"file": b"a regular file"}


def test_checking_a_run_changes_nothing(tmp_path, tiny_config, other_run):
    before = contents(other_run)
    runs.check(other_run, tiny_config("eval.exit_threshold=0.5"))
    with pytest.raises(UserError, match=r"another config.*set back seed: 0 -> 1"):
        runs.check(other_run, tiny_config("seed=1"))
    (other_run / "checkpoints" / "100").rmdir()  # training could take the folder, not evaluation
    with pytest.raises(UserError, match="another config"):
        runs.check(other_run, tiny_config("seed=1"))
    assert contents(other_run) == before
    with pytest.raises(
        UserError, match=r"lacks config\.json, tokenizer\.model, template\.txt, che"
    ):
        runs.check(tmp_path / "nothing", tiny_config())
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path):
    (tmp_path / "checkpoints" / "250.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not runs.has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "250").mkdir()
    assert runs.has_checkpoint(tmp_path)


def test_a_run_of_before_its_settings_were_written_goes_on(tmp_path, tiny_config):
    """Earlier versions had no `data.resize` and `model.image_size`, and None for a window."""
    values = dataclasses.asdict(tiny_config())
    del values["data"]["resize"], values["model"]["image_size"]
    values["model"] |= {"final_logits_softcap": 0.0, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with_checkpoint(tmp_path)
    open_config = tiny_config()
    for config in (open_config, runs.with_settings(open_config, runs.settings_of(open_config))):
        claim(tmp_path, config)
    loaded = runs.load_config(tmp_path)
    assert (loaded.model.image_size, loaded.model.sliding_window) == (28, 0)
    with pytest.raises(UserError, match=r"set back model\.image_size: 28 -> 56"):
        claim(tmp_path, tiny_config("model.image_size=56"))


def test_who_stops_while_all_look_for_a_file_does_not_wait_for_the_others(tmp_path, monkeypatch):
    def stop(look):
        monkeypatch.setattr(distributed, "on_main", lambda work: pytest.fail("it waits"))
        raise PreemptedError("a notice came")

    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(distributed, "everywhere", stop)
    with pytest.raises(PreemptedError):
        runs._check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_behind_another_start_s_vocabulary_do_not_stay(tmp_path, tiny_config):
    claim(tmp_path, tiny_config())
    (tmp_path / runs.PADDING_FILE).write_bytes(b"of that start")
    claim(tmp_path, tiny_config("seed=1"))
    assert not (tmp_path / runs.PADDING_FILE).exists()


def test_a_run_lives_in_a_bucket(bucket, tiny_config):
    workdir = bucket / "run"
    assert claim(workdir, tiny_config()) == tiny_config()
    template = experiment.make_template(tiny_config(), workdir)
    made = experiment.make_tokenizer(
        tiny_config(), workdir, template, [], tokenizer.train_tokenizer(
            ["quite", "another"], bucket / "given.model", vocab_size=280
        )
    )  # fmt: skip
    initialization.keep(workdir, None, experiment.model_config(tiny_config(), made))
    names = ["config.json", "origin.json", "template.txt", "tokenizer.model"]
    assert sorted(path.name for path in workdir.iterdir()) == names
    assert experiment.given_tokenizer(tiny_config(), workdir, None).pieces == made.pieces
    files.write_whole(workdir / "checkpoints" / "100" / "metadata", "{}")
    assert not runs.has_checkpoint(workdir)  # a step has its name from the beginning
    files.write_whole(workdir / "checkpoints" / "100" / "commit_success.txt", "")
    assert runs.has_checkpoint(workdir)
    runs.check(workdir, tiny_config())
    with pytest.raises(UserError, match=r"another config.*set back seed: 0 -> 1"):
        claim(workdir, tiny_config("seed=1"))


def test_buckets_that_cannot_be_had(gcs, bucket, tiny_config):
    files.write_whole(bucket / "thesis.tex", "all of it")
    with pytest.raises(UserError, match="is not empty and holds no run of ours"):
        runs.claim(bucket, tiny_config())
    absent = files.locate("gs://absent/run")
    assert not runs.has_checkpoint(absent)
    with pytest.raises(UserError, match="there is no bucket gs://absent; correct the address"):
        runs.claim(absent, tiny_config())
    with pytest.raises(UserError, match="you have no right to"):
        runs.claim(files.locate("gs://read-only/run"), tiny_config())


def of(name, **splits):
    return {"data_set": name, "splits": splits}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (of("video_folder/1fps_2/1.0.0", train=["a"], test=["b"]), "1fps_1/1.0.0, not video_fo"),
        (of("video_folder/1fps_1/1.0.0", train=["a"], test=["b", "c"]), "'test' has c more"),
        (of("video_folder/1fps_1/1.0.0", train=["b"], test=["a"]), "'train' has b more and a less"),
        (of("video_folder/1fps_1/1.0.0", train=3, test=2), "'train' has 3 videos instead of"),
    ],
)
def test_a_run_is_not_resumed_or_tested_with_other_videos(tmp_path, tiny_config, given, message):
    """What it was trained on could be tested."""
    own = of("video_folder/1fps_1/1.0.0", train=["a"], test=["b"])
    claim(tmp_path, tiny_config())
    runs.keep_data(tmp_path, own)
    runs.check_data(tmp_path, given)  # nothing is trained yet
    with_checkpoint(tmp_path)
    runs.check_data(tmp_path, own)
    runs.keep_data(tmp_path, given)  # the first counts
    with pytest.raises(UserError, match=message):
        runs.check_data(tmp_path, given)
