"""Text for SigLIP's text tower: canonical form, SentencePiece, a fixed length.

As `transformers.SiglipTokenizer` has it: lower case, no punctuation, single spaces, then the pieces
and an end, which fills the rest of the row, too. The tower has no mask and reads the last position,
so the padding is part of what it was trained on. Names of pieces in a text, such as `</s>`, are
text. SigLIP 2 has Gemma's pieces and keeps punctuation; it is not served here.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence

import numpy as np
import sentencepiece

from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, open_binary

EOS = PAD = 1
TEXT_LEN = 64  # tokens, in all released sizes but So400m/14 at 224 pixels, which has 16

_GEMMA_BOS = 2
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize_text(text: str) -> str:
    """Lower case without ASCII punctuation, runs of space made one: `"A  dog's day!"` ->
    `"a dogs day"`.
    """
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


class SiglipTokenizer:
    """Texts to rows of tokens.

    Args:
      path: the SentencePiece model, `spiece.model` in Hugging Face's folder.
      text_len: tokens of a row, the text tower's `text_len`.

    Raises:
      UserError: no such file, no SentencePiece model, or another one than SigLIP's.
    """

    def __init__(self, path: str | os.PathLike[str], *, text_len: int = TEXT_LEN):
        path = locate(path)
        if not exists(path) or path.is_dir():
            raise UserError(
                f"tokenizer {path} is not a file; give the path of SigLIP's spiece.model (SigLIP 2 "
                "has Gemma's tokenizer and is not served)"
            )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            with open_binary(path) as file:
                self._processor.LoadFromSerializedProto(file.read())
        except RuntimeError as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece model ({error})") from None
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        if eos != EOS or bos == _GEMMA_BOS:
            raise UserError(
                f"tokenizer {path} has its end at {eos} and its beginning at {bos} (-1: none); "
                "SigLIP's has its end at 1. Gemma's, which is SigLIP 2's, has its beginning at 2 "
                "and is not served; use the first SigLIP's spiece.model"
            )
        self._text_len = text_len

    @property
    def vocab_size(self) -> int:
        """Number of pieces, the text tower's `vocab_size`: 32,000 for the English models."""
        return self._processor.vocab_size()

    def encode_whole(self, text: str) -> np.ndarray:
        """int32[T], one text that is not cut.

        Raises:
          UserError: there is no word in it, or it is longer than a row.
        """
        num_pieces = len(self._processor.encode(canonicalize_text(text)))
        if not num_pieces:
            raise UserError(f"{text!r} has no word in it; write what is to be seen")
        if num_pieces > self._text_len - 1:
            raise UserError(
                f"{text!r} has {num_pieces} tokens, and the text tower takes {self._text_len - 1} "
                "and their end; say it in fewer words"
            )
        return self([text])[0]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32[B, T], a row per text; what is too long is cut, but for its end."""
        rows = np.full((len(texts), self._text_len), PAD, np.int32)
        for row, text in zip(rows, texts, strict=True):
            pieces = self._processor.encode(canonicalize_text(text))[: self._text_len - 1]
            row[: len(pieces)] = pieces
        return rows
