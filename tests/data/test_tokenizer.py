"""PaliGemma's id layout, and that any text has an encoding."""

import pytest
import sentencepiece

from deevisum_jax.data import tokenizer
from deevisum_jax.errors import UserError

TEXTS = [
    "title: transcript: sound:",
    "yes",
    "no",
    "the red ball came to the fair",
    "the blue ball came to the station",
    "a purple box at the school",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return tokenizer.train_tokenizer(TEXTS, path, vocab_size=320)


def test_ids_are_laid_out_as_in_paligemma(trained):
    pieces = [trained.processor.id_to_piece(i) for i in range(trained.vocab_size)]
    assert pieces[:5] == ["<pad>", "</s>", "<s>", "<unk>", "\n"]
    assert pieces[-1152] == "<loc0000>"
    assert pieces[-1152 + 1023 : -1152 + 1025] == ["<loc1023>", "<seg000>"]
    assert pieces[-1] == "<seg127>"
    assert trained.vocab_size <= 320 + 1152
    # A location in a text is its own piece, as in PaliGemma's prompts.
    assert trained.encode("<loc0007>") == [trained.vocab_size - 1152 + 7]


def test_a_newline_is_one_piece_wherever_it_stands(trained):
    [separator] = trained.separator
    for text in ("a\nb", "a\n", "\nb", "a \n b"):
        assert trained.encode(text).count(separator) == 1
        before, after = map(trained.encode, text.split("\n"))
        assert trained.encode(text) == [*before, separator, *after]


@pytest.mark.parametrize(
    "text", ["the red ball", " two  spaces ", "héllo ✓ 漢字 🎬", "line\nline", "\t", "ﬁ Å"]
)
def test_any_text_survives_the_round_trip(trained, text):
    ids = trained.encode(text)
    assert tokenizer.UNK not in ids
    assert trained.decode(ids) == text


def test_control_pieces_vanish_in_text(trained):
    ids = [tokenizer.BOS, *trained.encode("the ball"), tokenizer.EOS, tokenizer.PAD]
    assert trained.decode(ids) == "the ball"


def test_the_same_text_gives_the_same_tokenizer(trained, tmp_path):
    again = tokenizer.train_tokenizer(reversed(TEXTS), tmp_path / "again.model", vocab_size=320)
    assert again.processor.serialized_model_proto() == trained.processor.serialized_model_proto()


def test_a_copy_is_the_same_to_the_byte(trained, tmp_path):
    tokenizer.save_tokenizer(trained, tmp_path / "copy.model")
    loaded = tokenizer.load_tokenizer(tmp_path / "copy.model")
    assert loaded.processor.serialized_model_proto() == trained.processor.serialized_model_proto()
    assert [file.name for file in tmp_path.iterdir()] == ["copy.model"]


def test_little_text_gives_fewer_pieces_than_allowed(tmp_path):
    small = tokenizer.train_tokenizer(TEXTS, tmp_path / "t.model", vocab_size=100_000)
    assert small.vocab_size < 1000 + 1152


def test_too_few_pieces_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"of 100 pieces .* raise data.vocab_size"):
        tokenizer.train_tokenizer(TEXTS, tmp_path / "t.model", vocab_size=100)
    assert not list(tmp_path.iterdir())


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"missing\.model is not a file; give the path of"):
        tokenizer.load_tokenizer(tmp_path / "missing.model")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256))])
def test_no_sentencepiece_model(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        tokenizer.load_tokenizer(tmp_path / "bad.model")


def test_another_id_layout_is_refused(tmp_path):
    path = tmp_path / "other.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=60,
            model_type="bpe",
            minloglevel=2,
        )
    with pytest.raises(UserError, match=r"\(-1, 2, 1, 0\).*PaliGemma's layout is \(0, 1, 2, 3\)"):
        tokenizer.load_tokenizer(path)
