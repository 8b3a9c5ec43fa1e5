"""Tokens and masks of prompts, checked letter by letter."""

import numpy as np
import pytest

from deevisum_jax.data import prompts
from deevisum_jax.data.prompts import PromptEncoder, PromptTemplate, load_template
from deevisum_jax.data.tokenizer import BOS, EOS, PAD, train_tokenizer
from deevisum_jax.errors import UserError


class Letters:
    """Every letter is a token, its code point: prompts can be read off the ids."""

    separator = (ord("\n"),)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def encoder(text_len: int, template: str = "{title}|{transcript}|{sound}") -> PromptEncoder:
    return PromptEncoder(tokenizer=Letters(), template=PromptTemplate(template), text_len=text_len)


def prefix_of(encoded: dict[str, np.ndarray]) -> str:
    """The text between BOS and the separator."""
    prefix = encoded["tokens"][encoded["mask_input"] & ~encoded["mask_ar"]]
    assert prefix[0] == BOS
    assert prefix[-1] == ord("\n")
    return "".join(map(chr, prefix[1:-1]))


def test_tokens_and_masks_by_hand():
    encoded = encoder(12).encode(title="a", transcript="b", sound="c", label=0)
    # BOS a | b | c \n n o EOS pad
    letters = [ord(letter) for letter in "a|b|c\nno"]
    np.testing.assert_array_equal(encoded["tokens"], [BOS, *letters, EOS, PAD, PAD])
    np.testing.assert_array_equal(encoded["mask_ar"], [0] * 7 + [1] * 5)
    np.testing.assert_array_equal(encoded["mask_input"], [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(encoded["mask_loss"], [0] * 7 + [1] * 3 + [0] * 2)
    assert {name: (a.dtype, a.shape) for name, a in encoded.items()} == {
        "tokens": (np.int32, (12,)),
        "mask_ar": (bool, (12,)),
        "mask_input": (bool, (12,)),
        "mask_loss": (bool, (12,)),
    }


def test_the_label_is_the_word_behind_the_separator():
    encode = encoder(16).encode
    no, yes = (encode(title="a", transcript="b", sound="c", label=label) for label in (0, 1))
    assert "".join(map(chr, no["tokens"][no["mask_loss"]])) == "no" + chr(EOS)
    assert "".join(map(chr, yes["tokens"][yes["mask_loss"]])) == "yes" + chr(EOS)
    assert encoder(16).label_tokens == (ord("n"), ord("y"))
    assert prefix_of(no) == prefix_of(yes)


@pytest.mark.parametrize("part", ["title", "transcript", "sound"])
def test_a_template_of_ours_leaves_out_one_part(part):
    parts = {"title": "A", "transcript": "B", "sound": "C"}
    rest = [f"{name}: {said}" for name, said in parts.items() if name != part]
    assert load_template(f"no_{part}").fill(**parts) == "\n".join(rest)


@pytest.mark.parametrize(
    ("text_len", "prefix"),
    [
        # text_len - BOS - separator - "yes" - EOS = text_len - 6 letters of prefix.
        (19, "ab cd|x y z|s"),
        (18, "ab cd|x y|s"),
        (17, "ab cd|x y|s"),
        (16, "ab cd|x|s"),
        (14, "ab cd||s"),
        (13, "ab||s"),
        (11, "ab||s"),
        (10, "||s"),
    ],
)
def test_what_does_not_fit_is_cut_from_the_transcript_then_from_the_title(text_len, prefix):
    encoded = encoder(text_len).encode(title="ab cd", transcript="x y z", sound="s", label=1)
    assert prefix_of(encoded) == prefix
    target = encoded["tokens"][encoded["mask_loss"]]
    np.testing.assert_array_equal(target, [*map(ord, "yes"), EOS])


@pytest.mark.parametrize(
    ("letters", "prefix"),
    [
        # By turns from the segment outward: d, e, c, f, b, g, a, h.
        (26, "t|a b c d S T e f g h|s"),
        (23, "t|a b c d S T e f g h|s"),
        (22, "t|a b c d S T e f g|s"),
        (20, "t|b c d S T e f g|s"),
        (18, "t|b c d S T e f|s"),
        (16, "t|c d S T e f|s"),
        (14, "t|c d S T e|s"),
        (12, "t|d S T e|s"),
        (10, "t|d S T|s"),
        (8, "t|S T|s"),
        (6, "t|S|s"),
        (4, "t||s"),
        (3, "||s"),
    ],
)
def test_around_the_segment_the_farthest_words_are_cut_first(letters, prefix):
    # text_len - BOS - separator - "yes" - EOS = text_len - 6 letters of prefix.
    encoded = encoder(letters + 6).encode(
        title="t",
        before=["a", "b", "c", "d"],
        transcript="S T",
        after=["e", "f", "g", "h"],
        sound="s",
        label=1,
    )
    assert prefix_of(encoded) == prefix
    target = encoded["tokens"][encoded["mask_loss"]]
    np.testing.assert_array_equal(target, [*map(ord, "yes"), EOS])


@pytest.mark.parametrize(
    ("letters", "prefix"),
    [
        (23, "|a b c d S e f g h i j|"),
        (21, "|a b c d S e f g h i|"),
        (19, "|a b c d S e f g h|"),
        (17, "|b c d S e f g h|"),
        (13, "|b c d S e f|"),
        (11, "|b c d S e|"),
        (9, "|b c d S|"),
        (7, "|c d S|"),
        (5, "|d S|"),
        (3, "|S|"),
    ],
)
def test_lines_before_and_behind_come_in_by_turns(letters, prefix):
    # Outward: d c b, e f g h, a, i j.
    encoded = encoder(letters + 6).encode(
        title="", before=["a", "b c d"], transcript="S", after=["e f g h", "i j"], sound="", label=1
    )
    assert prefix_of(encoded) == prefix


def test_one_side_goes_on_where_the_other_has_ended():
    encode = encoder(7 + 6).encode
    said = {"title": "", "transcript": "", "sound": "", "label": 1}
    assert prefix_of(encode(before=["a", "b", "c"], after=[], **said)) == "|a b c|"
    assert prefix_of(encode(before=[], after=["a b c", "d e"], **said)) == "|a b c|"
    assert prefix_of(encode(before=["a"], after=["b", "c d"], **said)) == "|a b c|"


def test_neighbours_never_push_out_the_title_or_what_is_said_in_the_segment():
    long = ["x " * 50]
    encoded = encoder(18 + 6).encode(
        title="ab cd", before=long, transcript="p q r", after=long, sound="s", label=1
    )
    # 13 letters without neighbours, and two more take 4.
    assert prefix_of(encoded) == "ab cd|x x p q r|s"


def test_a_full_row_has_no_pads():
    encoded = encoder(19).encode(title="ab cd", transcript="x y z", sound="s", label=1)
    assert encoded["mask_input"].all()


def test_separator_and_target_survive_even_an_endless_sound():
    encoded = encoder(12).encode(title="", transcript="", sound="s" * 100, label=1)
    assert prefix_of(encoded) == "||ssss"
    np.testing.assert_array_equal(encoded["tokens"][-4:], [*map(ord, "yes"), EOS])


def test_braces_in_what_is_said_are_text():
    encoded = encoder(40).encode(title="{sound}", transcript="{0} {", sound="s", label=0)
    assert prefix_of(encoded) == "{sound}|{0} {|s"


def test_a_text_length_that_cannot_hold_the_empty_prompt_is_refused():
    encoder(8)  # BOS | | \n y e s EOS
    with pytest.raises(UserError, match=r"data\.text_len=7 .* at least 8"):
        encoder(7)


def test_labels_that_begin_alike_are_refused():
    class Spaced(Letters):
        def encode(self, text: str) -> list[int]:
            return [ord("_"), *super().encode(text)]

    with pytest.raises(UserError, match="begins all of no, yes with one piece"):
        PromptEncoder(tokenizer=Spaced(), template=PromptTemplate("{title}"), text_len=20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{titel}", r"names \{titel\}; did you mean 'title'"),
        ("{}", r"names \{\}; choose one of sound, title, transcript"),
        ("{title.upper}", r"names \{title.upper\}"),
        ("{title", "malformed"),
        ("title}", "malformed"),
        ("{title} {title}", r"\{title\} plainly and only once"),
        ("{title:>9}", "plainly and only once"),
        ("{title!r}", "plainly and only once"),
    ],
)
def test_bad_templates_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        PromptTemplate(text)


def test_doubled_braces_are_braces():
    assert PromptTemplate("{{{title}}}").fill(title="a", transcript="", sound="") == "{a}"


def test_templates_by_name_and_by_path(tmp_path):
    text = load_template().fill(title="A", transcript="B", sound="C")
    assert text == "title: A\ntranscript: B\nsound: C"
    (tmp_path / "mine.txt").write_text("say {title}\n", encoding="utf-8")
    assert load_template(str(tmp_path / "mine.txt")).text == "say {title}"


def test_an_unknown_template_names_ours(tmp_path):
    with pytest.raises(UserError, match=r"'deevisun' is neither .* did you mean 'deevisum'"):
        load_template("deevisun")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe{title}")
    with pytest.raises(UserError, match="no text in UTF-8"):
        load_template(str(tmp_path / "binary.txt"))


def test_with_a_trained_tokenizer(tmp_path):
    tokens = train_tokenizer(
        ["title: transcript: sound:", "yes", "no", "the red ball"],
        tmp_path / "t.model",
        vocab_size=300,
    )
    encoder = PromptEncoder(tokenizer=tokens, template=load_template(), text_len=64)
    encoded = encoder.encode(title="the red ball", transcript="", sound="no sound", label=1)
    real = encoded["tokens"][encoded["mask_input"]]
    assert tokens.decode(real) == ("title: the red ball\ntranscript: \nsound: no sound\nyes")
    assert len(set(encoder.label_tokens)) == len(prompts.LABEL_WORDS)
