r"""DEEVISum's prompt: what the title, the transcript and the sound say of a segment, as tokens.

Laid out as in big_vision: `[BOS prefix]["\n"][suffix EOS][pads]`. The prefix is seen in full by
every position (`mask_ar` 0), the suffix causally (`mask_ar` 1), and only the suffix is counted in
the loss.
"""

from __future__ import annotations

import bisect
import dataclasses
import importlib.resources
import itertools
import os
import string
from collections.abc import Sequence

import numpy as np

from deevisum_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer
from deevisum_jax.errors import UserError, closest
from deevisum_jax.files import exists, locate, open_binary

FIELDS = ("title", "transcript", "sound")
# The class is one word after the separator. The language model learns to say it; scores are read
# from the exit heads, in front of it.
LABEL_WORDS = ("no", "yes")
DEFAULT_TEMPLATE = "deevisum"


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Text with the places `{title}`, `{transcript}` and `{sound}`, each used at most once."""

    text: str

    def __post_init__(self) -> None:
        try:
            pieces = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(f"the prompt template is malformed ({error})") from None
        places = [place for _, *place in pieces if place[0] is not None]
        names = [name for name, _, _ in places]
        for name, spec, conversion in places:
            if name not in FIELDS:
                raise UserError(f"the prompt template names {{{name}}}; {closest(name, FIELDS)}")
            if spec or conversion or names.count(name) > 1:
                raise UserError(f"the prompt template must hold {{{name}}} plainly and only once")

    def fill(self, *, title: str, transcript: str, sound: str) -> str:
        """The prompt of one segment."""
        return self.text.format(title=title, transcript=transcript, sound=sound)


def load_template(name_or_path: str | os.PathLike[str] = DEFAULT_TEMPLATE) -> PromptTemplate:
    """A template of ours by name (`deevisum`), or a text file of the user's by path.

    Raises:
      UserError: neither a known name nor a file, or a template with unknown places.
    """
    ours = importlib.resources.files("deevisum_jax.data") / "templates"
    names = {file.name.removesuffix(".txt"): file for file in ours.iterdir()}
    name_or_path = os.fspath(name_or_path)
    if name_or_path in names:
        content = names[name_or_path].read_bytes()
    else:
        file = locate(name_or_path)
        if not exists(file) or file.is_dir():
            raise UserError(
                f"prompt template {name_or_path!r} is neither a text file nor a template of ours; "
                f"{closest(name_or_path, names)}"
            )
        with open_binary(file) as stream:
            content = stream.read()
    try:
        return PromptTemplate(content.decode("utf-8").rstrip("\n"))
    except UnicodeDecodeError:
        raise UserError(
            f"prompt template {name_or_path} is no text in UTF-8; save it as such"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns the words of one segment into fixed-length tokens and masks."""

    tokenizer: Tokenizer
    template: PromptTemplate
    text_len: int  # tokens of the prompt, the separator and the label word
    caption_len: int = 0  # tokens of a caption behind the label word; T = text_len + caption_len

    def __post_init__(self) -> None:
        needed = 1 + len(self.tokenizer.separator) + max(map(len, self._suffixes()))
        bare = len(self.tokenizer.encode(self.template.fill(title="", transcript="", sound="")))
        if self.text_len < needed + bare:
            raise UserError(
                f"data.text_len={self.text_len} cannot hold the empty prompt and its target; "
                f"raise it to at least {needed + bare}, or shorten the template"
            )
        if len(set(self.label_tokens)) < len(LABEL_WORDS):
            raise UserError(
                f"the tokenizer begins all of {', '.join(LABEL_WORDS)} with one piece, so no logit "
                "tells them apart; use paligemma_tokenizer.model, or leave data.tokenizer empty"
            )

    def _suffixes(self) -> list[list[int]]:
        return [[*self.tokenizer.encode(word), EOS] for word in LABEL_WORDS]

    @property
    def num_tokens(self) -> int:
        """T, the length of what `encode` gives."""
        return self.text_len + self.caption_len

    @property
    def num_targets(self) -> int:
        """Most tokens of one segment that the token loss counts."""
        return max(map(len, self._suffixes())) + self.caption_len

    @property
    def label_tokens(self) -> tuple[int, int]:
        """First token of the words for not-summary and summary."""
        no, yes = (suffix[0] for suffix in self._suffixes())
        return no, yes

    def encode(
        self,
        *,
        title: str,
        transcript: str,
        sound: str,
        label: int,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        caption: str = "",
    ) -> dict[str, np.ndarray]:
        """Tokens and masks of one segment.

        What does not fit is cut word by word, the farthest from the segment first: from the ends of
        `before` and `after`, then from the end of `transcript`, then of the title; never from the
        sound, the separator or the label. Lines of `before` and `after` come in by turns, nearest
        first. A caption is cut to `caption_len`. The prompt has `before`, `transcript` and `after`
        one behind the other: where subtitles overlap, only the lines of each part are in order.

        Args:
          title: the video's title.
          transcript: what is said in the segment.
          sound: what the sound is like, in words.
          label: 0 or 1, the target.
          before: lines that are said before the segment, in the order of time.
          after: lines that are said after it, in the order of time.
          caption: what is seen and heard, told after the label.

        Returns:
          `tokens int32[T]`, `mask_ar`, `mask_input` and `mask_loss` `bool[T]`.
        """
        suffix = self._suffixes()[label]
        separator = self.tokenizer.separator
        budget = self.text_len - 1 - len(separator) - len(suffix)
        prefix = [BOS, *self._fit(title, (before, transcript, after), sound, budget), *separator]
        if caption and self.caption_len:
            told = self.tokenizer.encode(f" {caption}")[: self.caption_len]
            suffix = [*suffix[:-1], *told, EOS]
        T, num_prefix, num_real = self.num_tokens, len(prefix), len(prefix) + len(suffix)
        position = np.arange(T)
        return {
            "tokens": np.array([*prefix, *suffix] + [PAD] * (T - num_real), np.int32),
            "mask_ar": position >= num_prefix,
            "mask_input": position < num_real,
            "mask_loss": (position >= num_prefix) & (position < num_real),
        }

    def _fit(
        self,
        title: str,
        said: tuple[Sequence[str], str, Sequence[str]],  # before, in and after the segment
        sound: str,
        budget: int,
    ) -> list[int]:
        """The prompt with as many words, the title's first, as `budget` tokens hold."""
        before, within, after = said
        title_words, within_words = title.split(), within.split()
        around = _outward(before, after)

        def ids_of(num_words: int) -> list[int]:
            num_within = max(0, num_words - len(title_words))
            kept = around[: max(0, num_within - len(within_words))]
            transcript = [
                *reversed([word for word, is_before in kept if is_before]),
                *within_words[:num_within],
                *[word for word, is_before in kept if not is_before],
            ]
            text = self.template.fill(
                title=" ".join(title_words[:num_words]),
                transcript=" ".join(transcript),
                sound=sound,
            )
            return self.tokenizer.encode(text)

        num_words = len(title_words) + len(within_words) + len(around)
        ids = ids_of(num_words)
        if len(ids) > budget:
            fitting = (
                bisect.bisect_right(range(num_words), budget, key=lambda n: len(ids_of(n))) - 1
            )
            # Without any word only a long sound or template is left: cut it like any text.
            ids = ids_of(max(fitting, 0))[:budget]
        return ids


def _outward(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, bool]]:
    """Words by their distance from the segment, lines by turns, and whether they come before it.

    `_outward(["a b", "c d"], ["e f"])` is d, c, e, f, b, a.
    """
    words = []
    for line_before, line_after in itertools.zip_longest(reversed(before), after, fillvalue=""):
        words += [(word, True) for word in reversed(line_before.split())]
        words += [(word, False) for word in line_after.split()]
    return words
