"""Cues from SubRip and WebVTT files and from text streams, and which of them is taken."""

from __future__ import annotations

import numpy as np
import pytest

from deevisum_jax.data.subtitles import (
    Cue,
    lines_around,
    load_subtitles,
    read_subtitles,
    text_between,
)
from deevisum_jax.errors import UserError
from tests.media import solid_frames, write_video

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Hello</i>
<font color="red">there</font>

2
00:00:02,000 --> 00:00:04,000 X1:10 X2:20
{\\an8}two &amp; three

42

3
01:00:00,5 --> 01:00:01,250
a < b and <3

"""

VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE
00:00.000 --> 00:01.000 is not a cue here

intro
00:01.000 --> 00:02.500 line:80% align:start
<v Roger>Hello <c.loud>there</c>&nbsp;you<00:00:02.000> all</v>

01:00:00.500 --> 01:00:01.250
&lt;laughs&gt;
"""


def _write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_subrip(tmp_path, newline, encoding):
    path = _write(tmp_path / "a.srt", SRT.replace("\n", newline), encoding)
    assert read_subtitles(path) == [
        Cue(1.0, 2.5, "Hello there"),
        Cue(2.0, 4.0, "two & three 42"),  # a number in the text, after a blank line
        Cue(3600.5, 3601.25, "a < b and <3"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".vtt", ".srt"])  # known by its first line
def test_webvtt(tmp_path, newline, encoding, suffix):
    path = _write(tmp_path / f"a{suffix}", VTT.replace("\n", newline), encoding)
    assert read_subtitles(path) == [
        Cue(1.0, 2.5, "Hello there you all"),
        Cue(3600.5, 3601.25, "<laughs>"),
    ]


def test_cues_are_ordered_and_empty_ones_left_out(tmp_path):
    text = (
        "00:05,000 --> 00:06,000\nlater\n\n"
        "00:03,000 --> 00:04,000\n<i></i>\n\n"
        "00:01,000 --> 00:02,000\nsooner\n"
    )
    cues = read_subtitles(_write(tmp_path / "a.srt", text))
    assert [cue.text for cue in cues] == ["sooner", "later"]


@pytest.mark.parametrize("text", ["", "\n\n", "WEBVTT\n", "WEBVTT"])
def test_files_without_cues_are_empty(tmp_path, text):
    assert read_subtitles(_write(tmp_path / "a.vtt", text)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n00:00:01,000 -> 00:00:02,000\nhi\n", "line 2: expected a cue number or a timing"),
        ("1\n00:00:01,000 --> soon\nhi\n", "line 2: cannot read the timing"),
        ("1\n00:00:03,000 --> 00:00:02,000\nhi\n", "line 2: the cue ends before it starts"),
        ("dear diary\n", "line 1: expected a cue number"),
        ("WEBVTT\n\n00:01.000 00:02.000\nhi\n", "line 3: expected a cue timing"),
        ("WEBVTT\n\nid\n1.000 --> 2.000\nhi\n", "line 4: cannot read the timing"),
        ("1\n00:00:01,000 --> 00:61:02,000\nhi\n", "line 2: cannot read the timing"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refusal:
        read_subtitles(_write(tmp_path / "bad.srt", text))
    assert "bad.srt" in str(refusal.value)


def test_other_encodings_are_named_with_the_way_out(tmp_path):
    path = _write(tmp_path / "a.srt", "1\n00:01,000 --> 00:02,000\ncafé\n", "latin-1")
    with pytest.raises(UserError, match=r"line 3: not UTF-8 text.*iconv"):
        read_subtitles(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such subtitle file"):
        read_subtitles(tmp_path / "absent.srt")
    with pytest.raises(UserError, match=r"'.ass' are not read"):
        read_subtitles(_write(tmp_path / "a.ass", "[Script Info]"))


def test_text_between_takes_every_overlapping_cue_once():
    cues = [Cue(0, 2, "a"), Cue(1, 3, "b"), Cue(3, 4, "b"), Cue(4, 4, "c"), Cue(4, 6, "d")]
    assert text_between(cues, 0, 1) == "a"
    assert text_between(cues, 1, 2) == "a b"
    assert text_between(cues, 2, 4) == "b"  # shown twice in a row, said once
    assert text_between(cues, 4, 5) == "c d"
    assert text_between(cues, 6, 8) == ""
    assert text_between([], 0, 9) == ""


def test_sidecars_by_order(tmp_path):
    video = tmp_path / "talk.mp4"
    video.touch()
    order = ["talk.vtt", "talk.srt", "talk.en.vtt", "talk.en-US.srt", "talk.de.vtt"]
    for name in order:
        _write(tmp_path / name, f"00:01,000 --> 00:02,000\n{name}\n")
    for name in ("talk2.vtt", "talk.show.vtt", "other.vtt"):
        _write(tmp_path / name, "00:01,000 --> 00:02,000\nnot ours\n")
    for name in order:
        assert load_subtitles(video) == [Cue(1.0, 2.0, name)]
        (tmp_path / name).unlink()


def test_explicit_path_beats_the_sidecar(tmp_path):
    _write(tmp_path / "talk.vtt", "00:01,000 --> 00:02,000\nbeside\n")
    given = _write(tmp_path / "given.srt", "00:01,000 --> 00:02,000\ngiven\n")
    assert load_subtitles(tmp_path / "talk.mp4", given) == [Cue(1.0, 2.0, "given")]


def test_none_takes_no_subtitles_whatever_lies_beside(tmp_path):
    (tmp_path / "talk.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n")
    assert [cue.text for cue in load_subtitles(tmp_path / "talk.mp4")] == ["hello"]
    assert load_subtitles(tmp_path / "talk.mp4", "none") == []


def test_text_stream_inside_counts_from_the_first_frame(tmp_path):
    cues = [(0.1, 0.4, "gone before"), (0.75, 1.5, "<i>Hello</i>\nthere"), (1.5, 2.0, "a &amp; b")]
    times_s = 0.5 + np.arange(16) / 8
    path = write_video(tmp_path / "in.mkv", solid_frames([0] * 16), times_s=times_s, cues=cues)
    assert load_subtitles(path) == [Cue(0.25, 1.0, "Hello there"), Cue(1.0, 1.5, "a & b")]


def test_video_without_subtitles_has_no_cues(tmp_path):
    assert load_subtitles(write_video(tmp_path / "bare.mp4", solid_frames([0]))) == []


def test_real_sidecar_and_real_stream(shared_data):
    cues = load_subtitles(shared_data / "clips/speech_friday.mp4")
    assert len(cues) == 5
    assert text_between(cues, 0, 1.2) == "Hildy! How are you?"
    cues = load_subtitles(shared_data / "clips/nasa_multi_stream.mp4")
    assert [(round(cue.start_s, 2), round(cue.end_s, 2)) for cue in cues][:2] == [
        (0.21, 4.26),
        (4.26, 8.35),
    ]
    assert cues[0].text == "NAR: This is the optical and science segment of the Webb"


SAID = [Cue(0, 1, "a"), Cue(1, 2, "b"), Cue(2, 4, "c"), Cue(4, 5, "d"), Cue(6, 7, "e")]


@pytest.mark.parametrize(
    ("start_s", "end_s", "context_s", "before", "after"),
    [
        (2, 4, 0.5, ["b"], ["d"]),
        (2, 4, 1, ["b"], ["d"]),  # "a" ended at 1, "e" has yet to begin
        (2, 4, 1.1, ["a", "b"], ["d"]),
        (2, 4, 2.1, ["a", "b"], ["d", "e"]),
        (3, 5, 1.5, ["b"], ["e"]),  # "c" is on screen in the segment and no neighbour
        (5, 6, 2, ["c", "d"], ["e"]),  # nothing is said in it
        (0, 2, 100, [], ["c", "d", "e"]),
        (8, 9, 1, [], []),
        (8, 9, 1.5, ["e"], []),
    ],
)
def test_lines_around_a_segment(start_s, end_s, context_s, before, after):
    assert lines_around(SAID, start_s, end_s, context_s) == (before, after)


def test_rolling_captions_around_a_segment_are_told_once():
    cues = [Cue(i, i + 1, text) for i, text in enumerate("aabbbccd")]
    # 0 a, 1 a, 2 b, 3 b, 4 b, 5 c, 6 c, 7 d.
    assert lines_around(cues, 3, 4, 9) == (["a"], ["c", "d"])
    assert text_between(cues, 3, 4) == "b"
    silent = [cue for cue in cues if cue.start_s != 3]
    assert text_between(silent, 3, 4) == ""
    assert lines_around(silent, 3, 4, 9) == (["a", "b"], ["c", "d"])  # "b" on both sides
