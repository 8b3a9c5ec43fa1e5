"""Tokens of SigLIP's text tower, against transformers' own tokenizer."""

import io

import numpy as np
import pytest
import sentencepiece
import transformers

from deevisum_jax.data.siglip_text import SiglipTokenizer, canonicalize_text
from deevisum_jax.errors import UserError

LINES = [
    "a photo of a dog playing in the park",
    "two cats sleep on the sofa",
    "the quick brown fox jumps over the lazy dog",
    "keyframe selection for video summaries",
]


def train(path, **ids):
    """A SentencePiece model laid out as SigLIP's: pad 0, end 1, unknown 2, no beginning."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | ids,
    )
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return train(tmp_path_factory.mktemp("siglip") / "spiece.model")


def test_canonical_text_has_no_case_no_punctuation_and_single_spaces():
    assert canonicalize_text("  A dog's  DAY,\n(at_the\tpark)! ") == "a dogs day atthe park"


@pytest.mark.parametrize(
    "text",
    [
        "A photo of a DOG.",
        "  two   cats\tsleep\non the sofa  ",
        "the dog's sofa, the cat's park!",
        "Zürich \u00a0 naïve — “fox” 日本語",
        "x_y \u3000 \u200b ▁dog",
        "",
        " !? ",
        "the quick brown fox " * 20,
    ],
)
def test_tokens_are_those_of_transformers(spiece, text):
    theirs = transformers.SiglipTokenizer(str(spiece))
    want = theirs([text], padding="max_length", max_length=64, truncation=True)["input_ids"]
    got = SiglipTokenizer(spiece)([text])
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


def test_the_end_fills_the_row_and_survives_the_cut(spiece):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode("the")
    assert len(pieces) == 3
    tokenizer = SiglipTokenizer(spiece, text_len=5)
    np.testing.assert_array_equal(
        tokenizer(["The!", "the the"]), [[*pieces, 1, 1], [*pieces, pieces[0], 1]]
    )
    assert tokenizer([]).shape == (0, 5)


def test_names_of_pieces_are_text(spiece):
    tokenizer = SiglipTokenizer(spiece)
    np.testing.assert_array_equal(tokenizer(["</s> dog"]), tokenizer(["s dog"]))


def test_the_vocabulary_is_the_model_s(spiece):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    assert SiglipTokenizer(spiece).vocab_size == processor.vocab_size() < 60


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"spiece\.model is not a file; give the path"):
        SiglipTokenizer(tmp_path / "spiece.model")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UserError, match="text is not a SentencePiece model"):
        SiglipTokenizer(tmp_path / "text")
    gemma = train(tmp_path / "gemma.model", bos_id=2, unk_id=3)
    with pytest.raises(UserError, match=r"gemma\.model has its end at 1 and its beginning at 2"):
        SiglipTokenizer(gemma)
    other = train(tmp_path / "other.model", bos_id=1, eos_id=2, unk_id=3)
    with pytest.raises(UserError, match=r"other\.model has its end at 2"):
        SiglipTokenizer(other)


def test_a_text_that_fits_is_encoded_whole(spiece):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode("the")
    tokenizer = SiglipTokenizer(spiece, text_len=4)  # three and the end
    np.testing.assert_array_equal(tokenizer.encode_whole("The!"), [*pieces, 1])


def test_a_text_that_does_not_fit_is_not_cut(spiece):
    tokenizer = SiglipTokenizer(spiece, text_len=4)
    with pytest.raises(UserError, match="'the the' has 6 tokens, and the text tower takes 3 and"):
        tokenizer.encode_whole("the the")


@pytest.mark.parametrize("text", ["", "  ", "?!", "\n"])
def test_a_text_without_a_word_is_refused(spiece, text):
    with pytest.raises(UserError, match="has no word in it"):
        SiglipTokenizer(spiece).encode_whole(text)
