"""The two pages: complete, self-contained, escaped and honest."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest
from PIL import Image

from deevisum_jax.errors import UserError
from deevisum_jax.summary import protocols, report
from deevisum_jax.summary.protocols import VideoResult
from deevisum_jax.summary.report import RunReport, write_run_report, write_video_report

SUMMARY = {
    "video": "holiday <2026>.mp4",
    "duration_s": 120.0,
    "budget": 0.15,
    "selected_s": 15.0,
    "segments": [
        {"start_s": 2.0 * k, "end_s": 2.0 * k + 2, "score": k / 60, "exit_layer": 8 + 5 * (k > 29),
         "selected": k > 50}
        for k in range(60)
    ],
    "shots": [
        {"start_s": 0.0, "end_s": 105.0, "score": 0.4, "selected": False},
        {"start_s": 105.0, "end_s": 120.0, "score": 0.9, "selected": True},
    ],
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Text, attributes, and whether every tag is closed in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.links, self.tags = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k in ("src", "href", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def result(tau, f1, *, constant=False, videos=10, row=None):
    return protocols.summarize_results(
        [
            VideoResult(video_id=f"v{i}", f1=f1, tau=tau, rho=tau + 0.03, constant=constant)
            for i in range(videos)
        ],
        row=row,
    )


BASELINES = {
    "random": result(0.0, 0.55, row="random"),
    "constant": result(0.0, 0.56, row="constant"),
    "time": result(0.05, 0.55, row="time"),
    "human": result(0.18, 0.54, row="human"),
    "oracle": result(0.37, 0.62, row="oracle"),
}


@pytest.fixture
def keyframe(tmp_path):
    path = tmp_path / "still.jpg"
    Image.fromarray(np.full((720, 1280, 3), 90, np.uint8)).save(path)
    return path


def test_video_page_tells_the_summary(tmp_path, keyframe):
    write_video_report(
        tmp_path / "report.html",
        SUMMARY,
        keyframes=[keyframe],
        transcript=[(1, 2, "hello there"), (110, 112, "<b>look</b> & see")],
        notes=["the file ends early"],
        film="the summary.mp4",
        num_layers=26,
    )
    page = Page(tmp_path / "report.html")
    assert "holiday <2026>.mp4" in page.text  # escaped in the source, whole for the reader
    assert "<2026>" not in page.source
    assert "<b>look</b> & see" in page.text
    assert "<b>look" not in page.source
    assert "0:15.0 summary, of 2:00.0" in page.text
    assert "12.5 % of the video (budget 15 %)" in page.text
    # 30 segments leave after layer 8, 30 after 13.
    assert "10.5 layers per segment of 26, by the exits taken" in page.text
    assert "left at layer 8 (50 %)" in page.text
    assert "the file ends early" in page.text
    outside = [link for link in page.links if not link.startswith("data:")]
    assert outside == ["the%20summary.mp4"]
    assert "http" not in page.source
    assert "<script" not in page.source


def test_timeline_places_shots_and_exits(tmp_path):
    write_video_report(tmp_path / "report.html", SUMMARY)
    rectangles = [a for tag, a in Page(tmp_path / "report.html").tags if tag == "rect"]
    places = [(float(r["x"]), float(r["width"])) for r in rectangles]
    # One kept shot, 105 to 120 of 120 s; then two runs of equal exit layers, 60 s each.
    assert places == [(875.0, 125.0), (0.0, 500.0), (500.0, 500.0)]


def test_video_page_without_exits_shots_or_segments(tmp_path):
    bare = SUMMARY | {"segments": [], "shots": [], "selected_s": 0.0}
    write_video_report(tmp_path / "report.html", bare, title="Bare")
    text = Page(tmp_path / "report.html").text
    assert "No segment was scored" in text
    assert "No shot fits" in text
    unknown = [segment | {"exit_layer": None} for segment in SUMMARY["segments"]]
    write_video_report(tmp_path / "report.html", SUMMARY | {"segments": unknown})
    assert "layer" not in Page(tmp_path / "report.html").text


def test_page_of_a_long_video_stays_small(tmp_path):
    segments = [
        {"start_s": k, "end_s": k + 1, "score": 0.5, "exit_layer": 8, "selected": False}
        for k in range(20_000)
    ]
    write_video_report(
        tmp_path / "report.html", SUMMARY | {"segments": segments, "duration_s": 20_000.0}
    )
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_run_page_shows_every_row_and_protocol(tmp_path):
    run = RunReport(
        title="fold 0",
        models={"student": result(0.2, 0.6)},
        baselines=BASELINES,
        exits=[{"exit layer": 8, "tau": 0.125}, {"exit layer": 26, "tau": 0.25}],
        ablation=[{"variant": "+ mentor", "F1": 0.5712}],
        losses={"loss/ce": ([0, 10, 20], [2.0, np.nan, 1.0]), "loss/none": ([0], [np.inf])},
        config={"model": {"variant": "tiny", "exit_layers": [8, 26]}, "lr": 1e-4},
        facts={"hardware": "2 CPU cores"},
        notes=["a first run"],
    )
    write_run_report(tmp_path / "run.html", run)
    page = Page(tmp_path / "run.html")
    for wanted in [
        "student 0.200", "random 0.000", "human 0.180", "0.571", "loss/ce", "no finite value",
        "Not drawn because not finite: 1", "model.variant", '"tiny"', "[8, 26]", "2 CPU cores",
        "a first run", *protocols.TVSUM.texts("oracle").values(),
    ]:  # fmt: skip
        assert wanted in page.text, wanted
    assert [link for link in page.links if not link.startswith("data:")] == []


def test_run_page_warns_of_what_the_numbers_hide(tmp_path):
    flat = RunReport(
        title="flat",
        models={"collapsed": result(0.0, 0.5, constant=True)},
        baselines=BASELINES,
    )
    write_run_report(tmp_path / "run.html", flat)
    text = Page(tmp_path / "run.html").text
    assert "F1 of collapsed is no better than that of a constant score." in text
    assert "tau of collapsed is no better than that of relative time alone (0.050)." in text
    assert "collapsed is the same throughout 10 of 10 videos" in text
    good = dataclasses.replace(flat, models={"good": result(0.3, 0.7, videos=2)})
    write_run_report(tmp_path / "run.html", good)
    text = Page(tmp_path / "run.html").text
    assert "no better than" not in text
    assert "more than people among themselves" in text
    assert "Only 2 videos: small differences" in text


def test_numbers_that_round_to_0_have_no_sign(tmp_path):
    assert [report.thousandths(value) for value in (-0.0004, 0.5)] == ["0.000", "0.500"]
    signed = [report.thousandths(value, "+") for value in (-0.0004, 0.5, -0.5)]
    assert signed == ["+0.000", "+0.500", "-0.500"]
    run = RunReport(title="", models={"student": result(-0.0002, 0.6)}, baselines=BASELINES)
    write_run_report(tmp_path / "run.html", run)
    assert "-0.000" not in Page(tmp_path / "run.html").source


def test_says_what_is_wrong(tmp_path, keyframe):
    with pytest.raises(UserError, match="lacks \\['shots'\\]"):
        write_video_report(tmp_path / "r.html", {k: v for k, v in SUMMARY.items() if k != "shots"})
    with pytest.raises(UserError, match="2 keyframes for 1 selected"):
        write_video_report(tmp_path / "r.html", SUMMARY, keyframes=[keyframe] * 2)
    with pytest.raises(UserError, match="cannot be read"):
        write_video_report(tmp_path / "r.html", SUMMARY, keyframes=[tmp_path / "no.jpg"])
    with pytest.raises(UserError, match="does not exist"):
        write_video_report(tmp_path / "no" / "r.html", SUMMARY)
    with pytest.raises(UserError, match="at least one result"):
        write_run_report(tmp_path / "r.html", RunReport(title="", models={}, baselines={}))
    assert not (tmp_path / "r.html").exists()
