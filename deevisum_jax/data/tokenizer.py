"""SentencePiece in PaliGemma's id layout: pad 0, eos 1, bos 2, then text, `<locNNNN>`, `<segNNN>`.

The released `paligemma_tokenizer.model` is loaded as it is. For models trained from scratch a small
tokenizer of the same layout is trained on the data set's own text; bytes it never saw fall back to
byte pieces, so that any user's text has an encoding.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, open_binary, write_whole

PAD, EOS, BOS, UNK = 0, 1, 2, 3
NUM_LOC, NUM_SEG = 1024, 128
SEPARATOR = "\n"  # ends the prefix; always tokenized on its own, as in big_vision
LOC_SEG = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `vocab_size` counts the loc and seg pieces."""

    processor: sentencepiece.SentencePieceProcessor

    @property
    def vocab_size(self) -> int:
        """Number of pieces, 257,152 for PaliGemma's own file."""
        return self.processor.vocab_size()

    @property
    def pieces(self) -> list[str]:
        """By id, behind the first four, whose names may differ between files of one tokenizer."""
        return [self.processor.id_to_piece(i) for i in range(UNK + 1, self.vocab_size)]

    @property
    def separator(self) -> list[int]:
        """Ids of the newline that ends the prefix (one id in PaliGemma's file: 108)."""
        return self.encode(SEPARATOR)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS."""
        return self.processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control pieces (pad, bos, eos) vanish."""
        return self.processor.decode([int(i) for i in ids])


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a SentencePiece model and checks PaliGemma's id layout.

    Raises:
      UserError: no such file, no SentencePiece model, or another id layout.
    """
    path = locate(path)
    if not exists(path) or path.is_dir():
        raise UserError(
            f"tokenizer {path} is not a file; give the path of paligemma_tokenizer.model"
        )
    with open_binary(path) as stream:
        return parse_tokenizer(stream.read(), str(path))


def parse_tokenizer(model: bytes, path: str) -> Tokenizer:
    """As `load_tokenizer`, from the content of the file at `path`."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise UserError(
            f"tokenizer {path} is not a SentencePiece model; give paligemma_tokenizer.model"
        ) from None
    layout = (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
    first_loc = processor.vocab_size() - len(LOC_SEG)
    if layout != (PAD, EOS, BOS, UNK) or processor.piece_to_id(LOC_SEG[0]) != first_loc:
        raise UserError(
            f"tokenizer {path} has (pad, eos, bos, unk) = {layout} and <loc0000> at "
            f"{processor.piece_to_id(LOC_SEG[0])}; PaliGemma's layout is (0, 1, 2, 3) with the "
            f"{len(LOC_SEG)} loc and seg pieces last; use paligemma_tokenizer.model"
        )
    return Tokenizer(processor)


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int
) -> Tokenizer:
    """Trains a small tokenizer in PaliGemma's layout and writes it to `path`.

    Args:
      texts: lines to learn the pieces from.
      path: where the model goes.
      vocab_size: upper bound on the text pieces (control, byte and newline pieces included); the
        1,152 loc and seg pieces come on top. Little text gives fewer.

    Raises:
      UserError: `vocab_size` cannot even hold the bytes and characters of the text.
    """
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(set(texts))),
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNK,
            # As in Gemma: text is kept to the letter, spaces and newlines included.
            user_defined_symbols=[SEPARATOR],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            num_threads=1,  # the same text gives the same pieces
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"no tokenizer of {vocab_size} pieces can be trained ({error}); raise data.vocab_size"
        ) from None
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    for piece in LOC_SEG:
        model.pieces.add(
            piece=piece,
            score=0.0,
            type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED,
        )
    model.trainer_spec.vocab_size = len(model.pieces)
    return _write(model.SerializeToString(), locate(path))


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> Tokenizer:
    """Writes a copy of `tokenizer` to `path`."""
    return _write(tokenizer.processor.serialized_model_proto(), locate(path))


def _write(model: bytes, path: epath.Path) -> Tokenizer:
    write_whole(path, model)
    return parse_tokenizer(model, str(path))
