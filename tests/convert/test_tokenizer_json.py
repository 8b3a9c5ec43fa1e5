"""The same ids from tokenizer.model and tokenizer.json, whichever was made of the other."""

import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from deevisum_jax.convert import hf_folder, tokenizer_json
from deevisum_jax.data import tokenizer as tokenizer_lib
from deevisum_jax.errors import UserError

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
# Some words of other scripts, and some that join to themselves in several ways.
TEXT = (
    "title: transcript: sound: yes no the a red blue ball wheel fell into station don't isn't loud "
    "quiet speech music 12 345 2024 Zürich naïve señor 漢字 東京 слово привет banana hahaha ababab "
    "aaaa ====== -------- (laughs)"
)
WORDS = TEXT.split()
TEXTS = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        " a",
        "a ",
        "  a  b   ",
        "a\nb",
        "a \n b\t\tc",
        "\r\n",
        "\x00\x7f",
    ),
    *("🎬", "👩‍👩‍👧 family", "e\u0301 é", "\ufeffx", "ﬁ Å ½", "▁ ▁▁a", "العربية"),
    *(
        "<loc0007>",
        "a<loc0007>b <seg001> c",
        "<loc1023><loc0000>",
        "<loc",
        "<0x41>",
        "</s>",
        "<s>a",
    ),
    *("a" * 7, "=" * 17, "hahahahaha", "bababa", " " * 9),
]


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(count)]


def texts() -> list[str]:
    rng = random.Random(1)
    bits = [*WORDS, *"abhn= \n\t.-05éü漢🎬▁", "  ", "<loc0003>", "<seg", "\n\n"]
    return (
        TEXTS
        + sentences(150, seed=2)
        + ["".join(rng.choices(bits, k=rng.randint(1, 30))) for _ in range(300)]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return tokenizer_lib.train_tokenizer(sentences(400, seed=0), path, vocab_size=700)


@pytest.fixture
def content(trained):
    # As it comes from a file, and free to be changed.
    return json.loads(json.dumps(tokenizer_json.to_tokenizer_json(trained)))


@pytest.fixture(scope="module", params=["GemmaTokenizer", "PreTrainedTokenizerFast"])
def theirs(trained, request, tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("folder")
    config = hf_folder.tokenizer_config(trained) | {"tokenizer_class": request.param}
    for name, written in (
        (tokenizer_json.TOKENIZER_JSON, tokenizer_json.to_tokenizer_json(trained)),
        (hf_folder.TOKENIZER_CONFIG, config),
        (hf_folder.CONFIG, {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}),
    ):
        (folder / name).write_text(json.dumps(written))
    return transformers.AutoTokenizer.from_pretrained(folder)


def proto(tokenizer):
    return sentencepiece_model_pb2.ModelProto.FromString(
        tokenizer.processor.serialized_model_proto()
    )


def hand_made(pieces: dict[str, float], *, user_defined: tuple[str, ...] = (), **fields):
    """A tokenizer with these normal pieces and their scores, in PaliGemma's layout."""
    model = sentencepiece_model_pb2.ModelProto()
    for name in ("<pad>", "<eos>", "<bos>"):
        model.pieces.add(piece=name, type=Piece.CONTROL)
    model.pieces.add(piece="<unk>", type=Piece.UNKNOWN)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=Piece.BYTE)
    for name, score in pieces.items():
        model.pieces.add(piece=name, score=score, type=Piece.NORMAL)
    for name in (*user_defined, *tokenizer_lib.LOC_SEG):
        model.pieces.add(piece=name, type=Piece.USER_DEFINED)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    for id_, name in ((0, "pad"), (1, "eos"), (2, "bos"), (3, "unk")):
        setattr(model.trainer_spec, f"{name}_id", id_)
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for field, value in fields.items():
        spec = model.trainer_spec if hasattr(model.trainer_spec, field) else model.normalizer_spec
        setattr(spec, field, value)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return tokenizer_lib.Tokenizer(processor)


def fast_ids(tokenizer, text: str) -> list[int]:
    import tokenizers

    made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.to_tokenizer_json(tokenizer)))
    return made.encode(text, add_special_tokens=False).ids


def test_merges_are_all_splits_by_the_score_of_the_whole():
    made = hand_made({"ab": -1.0, "abc": -2.0, "bc": 0.0, "a": -3.0, "b": -4.0, "c": -5.0})
    merges = tokenizer_json.to_tokenizer_json(made)["model"]["merges"]
    assert merges == [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]


def test_transformers_gives_our_ids(trained, theirs):
    given = texts()
    got = theirs(given, add_special_tokens=False)["input_ids"]
    assert got == [trained.encode(text) for text in given]


def test_transformers_decodes_as_we_do(trained, theirs):
    for text in texts():
        ids = trained.encode(text)
        assert theirs.decode(ids) == trained.decode(ids)


def test_transformers_puts_bos_in_front_and_knows_the_special_tokens(trained, theirs):
    a = trained.encode("a")
    assert theirs("a")["input_ids"] == [tokenizer_lib.BOS, *a]
    assert theirs.convert_tokens_to_ids("<image>") == trained.vocab_size
    text = "<image><image><bos>a<eos><pad>"
    ids = [trained.vocab_size, trained.vocab_size, tokenizer_lib.BOS, *a, 1, 0]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == "a"
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    # No token has an id behind <image>, for which the token table might have no row.
    assert len(theirs) == trained.vocab_size + 1


def test_there_and_back_is_the_same_but_for_two_names(trained, content):
    back = tokenizer_json.from_tokenizer_json(content)
    for text in texts():
        ids = trained.encode(text)
        assert back.encode(text) == ids
        assert back.decode(ids) == trained.decode(ids)
    before, after = (
        [(piece.piece, piece.score, piece.type) for piece in proto(tokenizer).pieces]
        for tokenizer in (trained, back)
    )
    differ = [(a[0], b[0]) for a, b in zip(before, after, strict=True) if a != b]
    assert differ == [("</s>", "<eos>"), ("<s>", "<bos>")]


def test_what_comes_back_is_loaded_as_any_tokenizer(content, tmp_path):
    back = tokenizer_json.from_tokenizer_json(content)
    saved = tokenizer_lib.save_tokenizer(back, tmp_path / "tokenizer.model")
    assert saved.decode([2, *saved.encode("the ball"), 1, 0]) == "the ball"


def test_merges_as_strings_are_read_too(trained, content):
    model = content["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    assert tokenizer_json.from_tokenizer_json(content).encode("aaaa") == trained.encode("aaaa")


def test_added_tokens_need_not_be_in_the_vocabulary(trained, content):
    for name in tokenizer_lib.LOC_SEG:
        del content["model"]["vocab"][name]
    back = tokenizer_json.from_tokenizer_json(content)
    assert back.encode("<seg127>") == [trained.vocab_size - 1]


def test_runs_of_spaces_that_are_pieces_of_their_own():
    # Gemma has them. They are taken whole before anything is merged.
    made = hand_made({"▁a": 0.0, "▁": -1.0, "a": -2.0}, user_defined=("▁▁", "▁▁▁"))
    back = tokenizer_json.from_tokenizer_json(tokenizer_json.to_tokenizer_json(made))
    for spaces in range(8):
        text = " " * spaces + "a a"
        assert fast_ids(made, text) == back.encode(text) == made.encode(text)


def test_a_tab_that_is_only_a_byte_still_merges():
    # As in Gemma's first file, where tabs are a piece and one tab is none.
    made = hand_made({"\t\t": 0.0, "a": -1.0})
    content = tokenizer_json.to_tokenizer_json(made)
    assert content["model"]["vocab"]["\t"] == 4 + 9
    back = tokenizer_json.from_tokenizer_json(content)
    for text in ("\t", "\t\t", "a\t\t\ta"):
        assert fast_ids(made, text) == back.encode(text) == made.encode(text)
    assert back.decode(back.encode("\t\t\t")) == "\t\t\t"


def test_pieces_of_one_score_stay_so():
    made = hand_made({"ab": 0.0, "ba": 0.0, "aba": -1.0, "bab": -1.0, "a": -2.0, "b": -3.0})
    back = tokenizer_json.from_tokenizer_json(tokenizer_json.to_tokenizer_json(made))
    scores = {piece.piece: piece.score for piece in proto(back).pieces}
    assert scores["aba"] == scores["bab"] < scores["ab"]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model_type": sentencepiece_model_pb2.TrainerSpec.UNIGRAM}, "it is no BPE"),
        ({"add_dummy_prefix": True}, "it puts a space in front"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"escape_whitespaces": False}, "it keeps spaces as they are"),
    ],
)
def test_a_model_that_tokenizer_json_cannot_express_is_refused(fields, fault):
    with pytest.raises(UserError, match=f"tokenizer.json: {fault}; PaliGemma's"):
        tokenizer_json.to_tokenizer_json(hand_made({"a": 0.0}, **fields))


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("model", "type"), "Unigram", "describes no BPE"),
        (("model", "byte_fallback"), False, "model.byte_fallback are not"),
        (("model", "ignore_merges"), True, "model.ignore_merges are not"),
        (("normalizer",), {"type": "Prepend", "prepend": "▁"}, "normalizer are not"),
        (("pre_tokenizer",), {"type": "ByteLevel"}, "pre_tokenizer are not"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(content, path, value, fault):
    *branches, name = path
    node = content
    for branch in branches:
        node = node[branch]
    node[name] = value
    with pytest.raises(UserError, match=rf"DIR/tokenizer\.json.*{fault}"):
        tokenizer_json.from_tokenizer_json(content, "DIR/tokenizer.json")


def test_gemmas_own_file_has_no_loc_pieces_and_is_refused(content):
    content["added_tokens"] = content["added_tokens"][:5]
    for name in tokenizer_lib.LOC_SEG:
        del content["model"]["vocab"][name]
    with pytest.raises(UserError, match=r"PaliGemma's layout is .* 1152 loc and seg pieces last"):
        tokenizer_json.from_tokenizer_json(content)


def test_tokens_behind_image_are_refused(content):
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<more>"})
    with pytest.raises(UserError, match=r"are not 0 to .* each once"):
        tokenizer_json.from_tokenizer_json(content)


def test_a_missing_byte_is_refused(content):
    vocab = content["model"]["vocab"]
    vocab["other"] = vocab.pop("<0xE2>")
    with pytest.raises(UserError, match="has no <0xE2>, so not every text"):
        tokenizer_json.from_tokenizer_json(content)


def test_merges_that_sentencepiece_would_do_all_the_same_are_asked_for(content):
    # A BPE that was trained by tokenizers lists one pair per piece.
    del content["model"]["merges"][-1]
    with pytest.raises(UserError, match=r"merges does not join .*\(1 such pairs\)"):
        tokenizer_json.from_tokenizer_json(content)
