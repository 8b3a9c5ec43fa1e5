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
from deevisum_jax.summary.report import (
    RunReport,
    tradeoff_table,
    write_run_report,
    write_video_report,
)

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


ASKED = SUMMARY | {
    "query": "a <red> door",
    "query_weight": 0.25,
    "segments": [s | {"importance": 0.1, "relevance": 0.1 + k / 600}
                 for k, s in enumerate(SUMMARY["segments"])],
    "storyboard": [
        {"time_s": 3.5, "relevance": 0.105, "filled": True},
        {"time_s": 64.0, "relevance": 0.15, "filled": False},
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


OFF = {
    "confidence": "max_probability", "thresholds": [None, None], "f1": 0.5, "tau": 0.3,
    "f1_loss": 0.0, "tau_loss": 0.0, "avg_depth": 6.0, "flops_saved": 0.0, "time_saved": None,
    "p_value": None, "passed": True, "chosen": False,
}  # fmt: skip
EARLY = {
    "confidence": "cosine", "thresholds": [0.97, None], "f1": 0.48, "tau": 0.305,
    "f1_loss": 0.02, "tau_loss": -0.005, "avg_depth": 3.5, "flops_saved": 0.41,
    "time_saved": {"median": 0.357, "low": 0.294, "high": 0.4},
    "p_value": 0.0312, "passed": True, "chosen": True,
}  # fmt: skip
TRADEOFF = {
    "points": [OFF, EARLY],
    "num_layers": 6,
    "epsilons": {"f1": 0.005, "tau": 0.01},
    "promise": "At most 0.5 F1 points are lost, with confidence 0.9.",
    "num_videos": 40,
    "machine": "2 CPU cores",
}


def tradeoff_page(folder, *points, **changes):
    tradeoff = TRADEOFF | ({"points": points} if points else {}) | changes
    run = RunReport(
        title="exits", models={"student": result(0.3, 0.5)}, baselines={}, tradeoff=tradeoff
    )
    write_run_report(folder / "run.html", run)
    return Page(folder / "run.html")


def drawn(page, tag, kind=None):
    """Attributes of the page's elements, of one class or of all, in both charts."""
    found = [attributes for name, attributes in page.tags if name == tag]
    return [a for a in found if kind is None or kind in a.get("class", "").split()]


def places(page):
    """Of the points, x and y, the chosen one last in each chart."""
    return [(float(a["cx"]), float(a["cy"])) for a in drawn(page, "circle")]


def test_tradeoff_places_points_tolerance_and_whiskers(tmp_path):
    page = tradeoff_page(tmp_path)
    # x: 300 units from 44 for 0 % to 42 %, a twentieth more than the 40 % of the whisker's end.
    # F1's y: 180 units upwards from 192 for 0 to 2.1 points. tau's: for -0.005 to 0.01 and a
    # twentieth of that at both ends, 0.0165 in all.
    # So 35.7 % is at 44 + 255 and 2 points are at 192 - 171.43; of tau 0 is 0.00575 and -0.005 is
    # 0.00075 above the bottom.
    assert [a["points"] for a in drawn(page, "polyline")] == [
        "44.0,192.0 299.0,20.57",
        "44.0,129.27 299.0,183.82",
    ]
    assert places(page) == [(44.0, 192.0), (299.0, 20.57), (44.0, 129.27), (299.0, 183.82)]
    # 0.5 points: 192 - 42.86. 0.01: 192 - 180 * 0.01575 / 0.0165.
    assert [float(a["y1"]) for a in drawn(page, "line", "tolerance")] == [149.14, 20.18]
    # 29.4 % and 40 %.
    whisker = drawn(page, "path", "whisker")[0]["d"]
    assert whisker == "M254.0 17.57v6M254.0 20.57H329.71M329.71 17.57v6"
    # 21 % and 1.3 points, in the chart of F1 alone: 44 + 150, 192 - 111.43, less 6 to its tip.
    assert [a["d"].split("l")[0] for a in drawn(page, "path", "published")] == ["M194.0 74.57"]
    ticks = [a for a in drawn(page, "text") if a.get("text-anchor") == "middle"]
    assert [float(a["x"]) for a in ticks[:3]] == [44.0, 115.43, 186.86]  # 0, 10, 20 %


def test_tradeoff_tells_its_promise_and_whose_the_published_point_is(tmp_path):
    page = tradeoff_page(tmp_path)
    for wanted in [
        "What leaving early saves, and costs", TRADEOFF["promise"], "means over 40 videos",
        "was measured on 2 CPU cores", "DEEVISum, as published (TVSum)",
        "21 % less inference time for 1.3 points of F1 on TVSum: a figure of another model",
        "not measured by us", "tolerance 0.5", "tolerance 0.01",
        "cosine 0.97 / - 3.50 41.0 % 35.7 % [29.4, 40.0] 48.00 0.305 2.00 -0.005 0.031 shown",
    ]:  # fmt: skip
        assert wanted in page.text, wanted
    assert page.text.count(" time saved, % ") == 2  # the axes
    assert len(drawn(page, "tr", "chosen")) == 1
    arias = [a["aria-label"] for a in drawn(page, "svg")]
    assert "chosen cosine 0.97 / -: 35.7 % of the time saved, F1 lost 2.00" in arias[0]
    assert "tau lost -0.005" in arias[1]


def test_tradeoff_without_time_shows_flops(tmp_path):
    page = tradeoff_page(tmp_path, OFF, EARLY | {"time_saved": None})
    assert page.text.count("FLOPs saved, % (time was not measured)") == 2
    assert "Time was not measured; what is saved are FLOPs." in page.text
    assert "2 CPU cores" not in page.text
    assert drawn(page, "path", "whisker") == []
    assert drawn(page, "circle", "hollow") == []
    assert places(page)[1] == (round(44 + 300 / 1.05, 2), 20.57)  # the furthest
    # Where some times were measured, the points without are hollow; off saves nothing either way.
    page = tradeoff_page(tmp_path, OFF, EARLY, EARLY | {"time_saved": None, "chosen": False})
    assert "hollow: FLOPs saved, not timed" in page.text
    assert len(drawn(page, "circle", "hollow")) == 2  # one in each chart


def test_tradeoff_of_off_alone_or_of_equal_points(tmp_path):
    page = tradeoff_page(tmp_path, OFF | {"chosen": True})
    assert places(page) == [(44.0, 192.0)] * 2
    assert page.text.count("off, chosen") == 2
    page = tradeoff_page(tmp_path, OFF, OFF, epsilons={})
    assert places(page) == [(44.0, 192.0)] * 4
    assert "tolerance 0" not in page.text
    with pytest.raises(UserError, match="at least one point"):
        tradeoff_page(tmp_path, points=[])


def test_tradeoff_with_gains_and_lost_time(tmp_path):
    slower = {"median": -0.1, "low": -0.19, "high": 0.0}
    page = tradeoff_page(tmp_path, OFF, EARLY | {"f1_loss": -0.007, "time_saved": slower})
    # x from -21 to 23 %: -19 and 21 %, and a twentieth of 40 at both ends; y from -0.8 to 1.4.
    assert places(page)[:2] == [
        (round(44 + 300 * 21 / 44, 2), round(192 - 180 * 0.8 / 2.2, 2)),
        (round(44 + 300 * 11 / 44, 2), round(192 - 180 * 0.1 / 2.2, 2)),
    ]
    assert "-10.0 % [-19.0, 0.0]" in page.text
    assert "-0.70 -0.005" in page.text


@pytest.mark.parametrize("epsilon", [0.0001, 0.005, 0.5])
def test_labels_of_a_tradeoff_stay_in_the_chart_and_apart(tmp_path, epsilon):
    curve = [
        EARLY
        | {"time_saved": None, "flops_saved": 0.1 * k, "f1_loss": 0.001 * k**2, "chosen": k == 3}
        for k in range(1, 7)
    ]
    page = tradeoff_page(tmp_path, OFF, *curve, epsilons={"f1": epsilon})
    labels = drawn(page, "text", "label")[:4]
    assert [a["class"] for a in labels] == [
        f"label {kind}" for kind in ("off", "chosen", "tolerance", "published")
    ]
    texts = ["off", "chosen", f"tolerance {100 * epsilon:g}", "DEEVISum, as published (TVSum)"]
    boxes = [
        report._text_box(text, float(a["x"]), float(a["y"]), a["text-anchor"])
        for text, a in zip(texts, labels, strict=True)
    ]
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 44
        assert right <= 360
        assert top >= 0
        assert bottom <= 192
        for other in boxes[:k]:
            apart = other[2] <= left or right <= other[0] or other[3] <= top or bottom <= other[1]
            assert apart, (texts[k], other)


def test_tradeoff_table_in_markdown():
    lines = tradeoff_table(TRADEOFF).splitlines()
    assert len({len(line) for line in lines}) == 1
    head, rule, off, early, published = ([c.strip() for c in line.split("|")] for line in lines)
    assert head == [
        "", "confidence", "thresholds", "layers of 6", "FLOPs saved", "time saved", "F1", "tau",
        "F1 lost", "tau lost", "p", "promise", "",
    ]  # fmt: skip
    assert rule == [
        "", 30 * "-", 12 * "-", 10 * "-" + ":", 10 * "-" + ":", 22 * "-" + ":", 8 * "-" + ":",
        8 * "-" + ":", 7 * "-" + ":", 9 * "-" + ":", 8 * "-" + ":", 17 * "-", "",
    ]  # fmt: skip
    assert off == [
        "", "off", "- / -", "6.00", "0.0 %", "-", "50.00", "0.300", "0.00", "0.000", "-", "shown",
        "",
    ]  # fmt: skip
    assert early == [
        "", "**cosine**", "**0.97 / -**", "**3.50**", "**41.0 %**", "**35.7 % [29.4, 40.0]**",
        "**48.00**", "**0.305**", "**2.00**", "**-0.005**", "**0.031**", "**shown**", "",
    ]  # fmt: skip
    assert published == [
        "", "DEEVISum, as published (TVSum)", "-", "-", "-", "21 %", "-", "-", "1.3", "-", "-",
        "not measured here", "",
    ]  # fmt: skip
    assert lines[2].startswith(
        "| off                            | - / -        |        6.00 |       0.0 % |     "
    )


def test_tradeoff_table_tells_what_was_not_shown_and_keeps_thresholds_off_1():
    refused = EARLY | {"passed": False, "chosen": False, "thresholds": [0.99996, 1.0, 0.5, None]}
    untested = refused | {"p_value": None}
    lines = tradeoff_table(TRADEOFF | {"points": [refused, untested]}).splitlines()
    assert "0.99996 / 1 / 0.5 / -" in lines[2]
    assert "| not shown " in lines[2]
    assert "| not tested " in lines[3]
    with pytest.raises(UserError, match="at least one point"):
        tradeoff_table(TRADEOFF | {"points": []})


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


# ---- A query and a storyboard ----


def test_a_page_shows_what_was_looked_for_and_found(tmp_path):
    stills = []
    for name in ("a.jpg", "b.jpg"):
        stills.append(tmp_path / name)
        Image.new("RGB", (640, 360)).save(stills[-1])
    write_video_report(
        tmp_path / "r.html", ASKED, storyboard=stills, contact_sheet="storyboard/all of it.jpg"
    )
    page = Page(tmp_path / "r.html")
    assert "Looked for: a <red> door (25 % of each score)" in page.text
    assert "2 frames that differ from each other, chosen for answering the query" in page.text
    assert "0:03.5 0.105 1:04.0 0.150" in page.text
    assert "relevance, 0.100 to 0.198" in page.text
    assert "pale ones fill" in page.text
    assert "storyboard/all%20of%20it.jpg" in page.links
    assert [dict(a).get("class") for t, a in page.tags if t == "figure"] == ["filled", None]
    [line] = [a["points"] for t, a in page.tags if a.get("class") == "asked"]
    places = [tuple(map(float, point.split(","))) for point in line.split()]
    assert (places[0], places[-1]) == ((0, 100), (1000, 6))  # the least and the most relevant


def test_a_storyboard_without_a_query_says_what_it_is_by(tmp_path):
    Image.new("RGB", (64, 36)).save(tmp_path / "a.jpg")
    board = [{"time_s": 3.5, "relevance": 0.9, "filled": False}]
    write_video_report(
        tmp_path / "r.html", SUMMARY | {"storyboard": board}, storyboard=[tmp_path / "a.jpg"]
    )
    page = Page(tmp_path / "r.html")
    assert "Storyboard 1 frame, chosen for being like the whole video" in page.text
    assert "Looked for" not in page.text
    assert "pale" not in page.text


def test_a_storyboard_needs_all_its_pictures(tmp_path):
    with pytest.raises(UserError, match="got 0 pictures for the 2 keyframes of the storyboard"):
        write_video_report(tmp_path / "r.html", ASKED)
