"""Whose folder it is, whose words, and which model: what a run is made of."""

import dataclasses

import numpy as np
import pytest

from deevisum_jax import datasets, experiment, initialization
from deevisum_jax.config import DataConfig
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import UserError
from tests.checkpoint_files import claim, with_checkpoint


@pytest.fixture(scope="module")
def records(data_dir):
    return datasets.Dataset(DataConfig(dataset="synthetic/tiny", data_dir=str(data_dir))).split(
        "train"
    )


def make_tokenizer(config, workdir, records) -> tokenizer.Tokenizer:
    template = experiment.make_template(config, workdir)
    given = experiment.given_tokenizer(config, workdir, initialization.find(config))
    return experiment.make_tokenizer(config, workdir, template, records, given)


def test_the_tokenizer_is_trained_once_and_kept(tmp_path, tiny_config, records):
    made = make_tokenizer(tiny_config(), tmp_path, records)
    again = make_tokenizer(tiny_config(), tmp_path, [])
    assert again.processor.serialized_model_proto() == made.processor.serialized_model_proto()
    assert made.vocab_size == 400 + 1152


def test_a_given_tokenizer_is_copied(tmp_path, tiny_config, records):
    given = tmp_path / "given.model"
    tokenizer.train_tokenizer(["yes", "no"], given, vocab_size=300)
    config = tiny_config(f"data.tokenizer={given}")
    workdir = tmp_path / "run"
    workdir.mkdir()
    make_tokenizer(config, workdir, records)
    assert (workdir / "tokenizer.model").read_bytes() == given.read_bytes()


def test_a_run_that_starts_from_another_keeps_its_tokenizer(tmp_path, tiny_config, other_run):
    theirs = (other_run / "tokenizer.model").read_bytes()
    (tmp_path / "same.model").write_bytes(theirs)
    for name, given in {"none": "", "same": tmp_path / "same.model"}.items():
        workdir = tmp_path / name
        workdir.mkdir()
        config = tiny_config(f"initialization={other_run}", f"data.tokenizer={given}")
        make_tokenizer(config, workdir, [])
        assert (workdir / "tokenizer.model").read_bytes() == theirs


def test_the_template_is_kept_and_its_file_may_go(tmp_path, tiny_config):
    given, workdir = tmp_path / "mine.txt", tmp_path / "run"
    given.write_text("Of {title}:\n{transcript}\n")
    config = tiny_config(f"data.template={given}")
    claim(workdir, config)
    made = experiment.make_template(config, workdir)
    with_checkpoint(workdir)
    given.unlink()
    claim(workdir, config)
    assert experiment.make_template(config, workdir) == made
    assert made.text == (workdir / "template.txt").read_text() == "Of {title}:\n{transcript}"


def test_an_edited_template_is_another_config(tmp_path, tiny_config):
    given, workdir = tmp_path / "mine.txt", tmp_path / "run"
    given.write_text("{titel}")
    config = tiny_config(f"data.template={given}")
    claim(workdir, config)
    with pytest.raises(UserError, match=r"names \{titel\}"):
        experiment.make_template(config, workdir)
    for text in ("{title} of too many words", "{title}"):  # before the first checkpoint it counts
        given.write_text(text)
        claim(workdir, config)
        assert experiment.make_template(config, workdir).text == text
    with_checkpoint(workdir)
    given.write_text("{transcript}")
    with pytest.raises(UserError, match=r"set back the text of data\.template=.*mine\.txt to that"):
        claim(workdir, config)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ("(2,)", r"must end with the depth of tiny, 4"),
        ("(2, 5)", r"must lie within 1 and the depth .* 4; out of range: \[5\]"),
        ("(0, 4)", r"out of range: \[0\]"),
        ("(4, 2)", r"must be strictly increasing; try \(2, 4\)"),
        ("(2, 2, 4)", r"must be strictly increasing"),
    ],
)
def test_exits_that_cannot_be(tiny_config, exits, message):
    with pytest.raises(UserError, match=message):
        experiment.model_config(tiny_config(f"model.exit_layers={exits}"))


def test_the_model_follows_the_config_and_the_tokenizer(tmp_path, tiny_config, records):
    config = tiny_config("model.dtype=bfloat16", "model.remat_policy=None", "data.vocab_size=301")
    tokens = make_tokenizer(config, tmp_path, records)
    made = experiment.model_config(config, tokens)
    assert (made.dtype, made.param_dtype, made.remat_policy) == ("bfloat16", "float32", None)
    assert made.exit_layers == (2, 4)
    # 301 + 1152 = 1453 pieces, up to a multiple of 128.
    assert tokens.vocab_size == 1453
    assert made.llm.vocab_size == 1536
    assert (made.llm.final_logits_softcap, made.llm.sliding_window) == (0.0, None)
    flags = ("model.final_logits_softcap=30", "model.sliding_window=4096")
    as_hugging_face = experiment.model_config(tiny_config(*flags), tokens).llm
    assert (as_hugging_face.final_logits_softcap, as_hugging_face.sliding_window) == (30.0, 4096)


def test_unknown_names_are_refused(tiny_config):
    for override, message in {
        "model.variant=tny": "'tny' is unknown: did you mean 'tiny'",
        "model.dtype=float16": "dtype 'float16' is unknown",
        "model.remat_policy=everything": "everything",
    }.items():
        with pytest.raises(UserError, match=message):
            experiment.model_config(tiny_config(override))


def test_a_prompt_that_does_not_fit_is_refused(tmp_path, tiny_config, records):
    config = tiny_config("data.text_len=4")
    tokens = make_tokenizer(config, tmp_path, records)
    template = experiment.make_template(config, tmp_path)
    with pytest.raises(UserError, match="raise it to at least"):
        experiment.make_encoder(config, tokens, template, 28)


def test_the_encoder_follows_the_config(tmp_path, tiny_config, records):
    flags = ("data.left_out=('sound',)", "data.num_frames=3", "data.transcript_context_s=5.0")
    config = tiny_config(*flags, "data.augment=True")
    tokens = make_tokenizer(config, tmp_path, records)
    template = experiment.make_template(config, tmp_path)
    encoder = experiment.make_encoder(config, tokens, template, 28)
    assert encoder.prompts.template == template
    assert (encoder.num_frames, encoder.image_size) == (3, 28)
    assert encoder.left_out == ("sound",)
    assert encoder.context_s == 5.0
    assert encoder.prompts.text_len == 48
    source = experiment.make_source(dataclasses.replace(config, seed=1), records, encoder)
    assert len(source) == 17  # 4 + 5 + 4 + 4 segments of two seconds
    changed, again = (source.changed(0, (0, 0))["frames"] for _ in range(2))
    np.testing.assert_array_equal(changed, again)
    assert (changed != source[0]["frames"]).any()
    plain = experiment.make_source(tiny_config(), records, encoder)
    np.testing.assert_array_equal(plain.changed(0, (0, 0))["frames"], plain[0]["frames"])
