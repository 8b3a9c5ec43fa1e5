r"""SentencePiece in PaliGemma's layout to Hugging Face's tokenizer.json, and back.

Both files describe the same byte-fallback BPE, each in its own way: SentencePiece scores every
piece and merges two neighbours whenever together they are a piece, the best score first;
tokenizer.json lists the pairs that may be merged, in order. From the one to the other goes the rule
of transformers' `convert_slow_tokenizer.generate_merges`: every split of a piece into two pieces is
such a pair, ordered by the score of the whole.

    SentencePiece                               tokenizer.json
    pieces, in the order of their ids           model.vocab, and <image> behind them
    scores of normal pieces                     model.merges
    control and unknown pieces (0 to 3)         added_tokens, special, named as in PaliGemma
    user-defined pieces ("\n", <loc0000>, ...)  added_tokens, found in the normalized text
    identity normalization, " " escaped as "▁"  normalizer Replace

The ids of any text agree, with two exceptions. tokenizer.json finds the names of special tokens
(`<eos>`, `<image>`) in a text, where SentencePiece reads characters. And a piece that holds a
character beyond ASCII which is no piece itself is only reached by SentencePiece; its trainer makes
no such pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from deevisum_jax.data.tokenizer import BOS, EOS, LOC_SEG, PAD, UNK, Tokenizer
from deevisum_jax.errors import UserError

TOKENIZER_JSON = "tokenizer.json"
IMAGE = "<image>"
# PaliGemma's names of the ids 0 to 3, whatever they are called in the SentencePiece model.
SPECIAL = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", UNK: "<unk>"}
# By what they go in a file; `data.tokenizer.train_tokenizer` keeps SentencePiece's own names.
_SPECIAL_NAMES = {PAD: ("<pad>",), EOS: ("<eos>", "</s>"), BOS: ("<bos>", "<s>"), UNK: ("<unk>",)}
_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# Finds nothing: the normalizer has left no space. Released files have it, or null.
_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, laid out as the one that Google released.

    `<image>` gets the id `tokenizer.vocab_size`, 257152 for PaliGemma's own file.

    Args:
      tokenizer: in PaliGemma's layout.

    Raises:
      UserError: the model is no byte-fallback BPE, or changes the text before it is cut.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(
        tokenizer.processor.serialized_model_proto()
    )
    _check_model(model)
    names = [SPECIAL.get(id_, piece.piece) for id_, piece in enumerate(model.pieces)]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _Piece.NORMAL}
    strays = _stray_characters(scores, names)
    for character in strays:
        # SentencePiece merges characters that are no pieces, tokenizer.json only what the
        # vocabulary lists: the byte is listed as the character that it is. So does Google's file
        # with the tab.
        names[names.index(_byte_piece(character))] = character
    added = [
        _added_token(id_, names[id_], special=piece.type != _Piece.USER_DEFINED)
        for id_, piece in enumerate(model.pieces)
        if piece.type in (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.USER_DEFINED)
    ]
    # A piece may come of several pairs. Where these overlap, as in a run of one character,
    # SentencePiece merges the left one, whose left part is the longer.
    merges = sorted(
        _splits(scores, strays), key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]))
    )
    bos = {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*added, _added_token(len(names), IMAGE, special=True)],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [
                bos,
                text,
                {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}
            },
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: id_ for id_, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def from_tokenizer_json(content: Mapping[str, Any], file: str = TOKENIZER_JSON) -> Tokenizer:
    """A SentencePiece tokenizer that gives the same ids; `<image>` is dropped.

    Args:
      content: of a tokenizer.json.
      file: its path, for messages.

    Raises:
      UserError: no byte-fallback BPE that SentencePiece can express, or not PaliGemma's id layout.
    """
    _check_pipeline(content, file)
    try:
        names, added = _names(content, file)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: model.vocab or added_tokens are damaged ({error!r}); download it again"
        ) from None
    vocabulary = set(names)
    byte_names = {}
    for byte, name in enumerate(_BYTES):
        # As in `to_tokenizer_json`, a character of one byte may stand for its byte.
        found = name if name in vocabulary or byte > 127 else chr(byte)
        if found not in vocabulary:
            raise UserError(
                f"{file}: model.vocab has no {name}, so not every text has an encoding; use the "
                "tokenizer.json of a PaliGemma 2"
            )
        byte_names[found] = name
    normal = [name for name in names if name not in added and name not in byte_names]
    scores = _scores(content, normal, [name for name in byte_names if len(name) == 1], file)

    model = sentencepiece_model_pb2.ModelProto()
    for id_, name in enumerate(names):
        if id_ in SPECIAL:
            kind = _Piece.UNKNOWN if id_ == UNK else _Piece.CONTROL
        elif name in added:
            kind = _Piece.USER_DEFINED
        else:
            kind = _Piece.BYTE if name in byte_names else _Piece.NORMAL
        model.pieces.add(piece=byte_names.get(name, name), score=scores.get(name, 0.0), type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(names)
    trainer.byte_fallback = True
    for id_, special in ((PAD, "pad"), (EOS, "eos"), (BOS, "bos"), (UNK, "unk")):
        setattr(trainer, f"{special}_id", id_)
        setattr(trainer, f"{special}_piece", names[id_])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return Tokenizer(processor)


def _byte_piece(character: str) -> str:
    return _BYTES[ord(character)]


def _check_model(model: sentencepiece_model_pb2.ModelProto) -> None:
    """Refuses what tokenizer.json cannot say."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    faults = {
        "it is no BPE": trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE,
        "it has no byte pieces": not trainer.byte_fallback,
        "it has unused pieces": any(piece.type == _Piece.UNUSED for piece in model.pieces),
        "it puts a space in front": normalizer.add_dummy_prefix,
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it normalizes characters": bool(normalizer.precompiled_charsmap),
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it puts spaces behind words": trainer.treat_whitespace_as_suffix,
    }
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise UserError(
            f"the tokenizer cannot be written as {TOKENIZER_JSON}: {', '.join(found)}; PaliGemma's "
            "layout is a BPE with byte fallback that leaves the text as it is. Use "
            "paligemma_tokenizer.model, or leave data.tokenizer empty to train one"
        )


def _stray_characters(scores: Mapping[str, float], names: list[str]) -> list[str]:
    """ASCII characters that occur in normal pieces without being pieces themselves."""
    known = set(names)
    return sorted({c for piece in scores for c in piece if c not in known and c.isascii()})


def _splits(normal: Collection[str], strays: Collection[str]) -> Iterator[tuple[str, str]]:
    """All pairs of parts that SentencePiece would join to a normal piece."""
    parts = {*normal, *strays}
    for piece in normal:
        for cut in range(1, len(piece)):
            if (left := piece[:cut]) in parts and (right := piece[cut:]) in parts:
                yield left, right


def _added_token(id_: int, name: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": id_,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # A user-defined piece is looked for where its spaces are escaped, as SentencePiece does.
        "normalized": not special,
        "special": special,
    }


def _check_pipeline(content: Mapping[str, Any], file: str) -> None:
    """Refuses what SentencePiece cannot do, or does otherwise."""
    model = content.get("model")
    is_bpe = isinstance(model, Mapping) and model.get("type") == "BPE"
    if not is_bpe or not isinstance(model.get("vocab"), Mapping):
        raise UserError(f"{file} describes no BPE tokenizer; use the one of a PaliGemma 2")

    def is_one_of(found: Any, *wanted: Any) -> bool:
        # A sequence of one step is that step.
        if isinstance(found, Mapping) and found.get("type") == "Sequence":
            steps = found.get("normalizers", found.get("pretokenizers", ()))
            found = steps[0] if len(steps) == 1 else found
        return found in wanted

    faults = {
        "model.byte_fallback": model.get("byte_fallback") is not True,
        "model.ignore_merges": bool(model.get("ignore_merges")),
        "model.dropout": bool(model.get("dropout")),
        "model.continuing_subword_prefix": bool(model.get("continuing_subword_prefix")),
        "model.end_of_word_suffix": bool(model.get("end_of_word_suffix")),
        "normalizer": not is_one_of(content.get("normalizer"), _NORMALIZER),
        "pre_tokenizer": not is_one_of(content.get("pre_tokenizer"), _PRE_TOKENIZER, None),
    }
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise UserError(
            f"{file}: {', '.join(found)} are not as in PaliGemma's, a BPE with byte fallback that "
            "only escapes spaces; use the tokenizer.json of a PaliGemma 2"
        )


def _names(content: Mapping[str, Any], file: str) -> tuple[list[str], set[str]]:
    """The pieces in the order of their ids, without `<image>`; and which are added tokens."""
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    ids = {**content["model"]["vocab"], **added}
    ids.pop(IMAGE, None)
    names = sorted(ids, key=ids.__getitem__)
    if [ids[name] for name in names] != list(range(len(names))):
        raise UserError(
            f"{file}: the ids of model.vocab and added_tokens without {IMAGE} are not 0 to "
            f"{len(names) - 1}, each once; use the tokenizer.json of a PaliGemma 2"
        )
    fits = names[-len(LOC_SEG) :] == LOC_SEG and all(
        names[id_] in alternatives for id_, alternatives in _SPECIAL_NAMES.items()
    )
    if not fits:
        raise UserError(
            f"{file}: the first pieces are {names[:4]} and the last is {names[-1:]}; PaliGemma's "
            f"layout is <pad>, <eos>, <bos>, <unk> first and the {len(LOC_SEG)} loc and seg "
            f"pieces last, {IMAGE} alone behind them"
        )
    return names, set(added)


def _scores(
    content: Mapping[str, Any], normal: list[str], strays: list[str], file: str
) -> dict[str, float]:
    """Scores of the normal pieces that lead to the merges in the order of the list.

    0, -1, -2, ... by the place of a piece's pairs in the list, then the pieces that no pair makes,
    as SentencePiece's trainer numbers them. Pieces whose pairs are interleaved were of one score.
    """
    pairs = [
        tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)
        for merge in content["model"].get("merges", ())
    ]
    kept, last = set(normal), {}
    # Other pieces are found before anything is merged, or, being bytes, never made of characters.
    merges = [(left + right, (left, right)) for left, right in pairs if left + right in kept]
    listed = {pair for _, pair in merges}
    if missing := [pair for pair in _splits(normal, strays) if pair not in listed]:
        raise UserError(
            f"{file}: model.merges does not join {missing[0][0]!r} and {missing[0][1]!r}, though "
            f"both and {''.join(missing[0])!r} are pieces ({len(missing)} such pairs); "
            "SentencePiece would. Use the tokenizer.json of a PaliGemma 2"
        )
    for place, (piece, _) in enumerate(merges):
        last[piece] = place
    scores: dict[str, float] = {}
    group, reach = 0, -1
    for place, (piece, _) in enumerate(merges):
        if piece not in scores:
            if place > reach:
                group += 1
            scores[piece] = float(1 - group)
            reach = max(reach, last[piece])
    rest = [piece for piece in normal if piece not in scores]
    return scores | {piece: float(-group - i) for i, piece in enumerate(rest)}
