"""Video in, summary out: `python -m deevisum_jax.summarize VIDEO --checkpoint RUN --out DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import absl.logging
import jax
import numpy as np

from deevisum_jax import checkpoints, experiment, media, runs, sharding
from deevisum_jax.data import audio, pipeline, prompts, subtitles, tokenizer
from deevisum_jax.data.segments import Video, segment_bounds
from deevisum_jax.data.video import DecodedVideo, decode_video
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.files import whole_folder, write_whole, writing
from deevisum_jax.inference import scoring
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import render, report, select, shots

_FRAME_RATE = 2.0  # frames per second looked at, the rate of the stored data sets
_MIN_SUMMARY_S = 0.5  # below this there is nothing to watch
_THE_RUNS = object()  # stands for the run's own exit threshold; None is "off"
_EXAMPLES = """\
examples:
  python -m deevisum_jax.summarize holiday.mp4 --checkpoint runs/quickstart --out holiday/
  python -m deevisum_jax.summarize talk.mkv --checkpoint runs/quickstart --out talk/ \\
      --title "Keynote" --subtitles talk.srt --budget 0.1 --exit_threshold off

what DIR gets, all of it or nothing:
  report.html    a page to look at: the film, the scores over time, every shot, the words
  summary.mp4    the chosen shots in order, H.264 and AAC
  summary.json   the score and the exit of every segment, every shot and whether it was chosen
  keyframes/     one still of each chosen shot

Exit status: 0 done, 2 a mistake in what was given (a message says which, and the next step),
130 interrupted.
"""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    with whole_folder(args.out) as folder:
        # A file that is no video is better known before gigabytes of parameters are read.
        with media.open_media(args.video) as container:
            media.video_stream(container, args.video)
        _say(f"loading {args.checkpoint}")
        student = Student(args.checkpoint)
        _say(f"decoding {args.video}")
        film = read_film(
            args.video,
            size=student.model_config.img.image_size,
            resize=student.encoder.resize,
            title=args.title,
            subtitles_path=args.subtitles,
        )
        threshold = student.config.eval.exit_threshold
        if args.exit_threshold is not _THE_RUNS:
            threshold = args.exit_threshold
        _say(f"scoring {film.video.duration_s:.0f} s of video")
        summary = summarize(film, student, budget=args.budget, threshold=threshold)
        _say(f"writing {args.out}")
        with writing(args.out):
            write_outputs(film, summary, folder, num_layers=student.model_config.llm.depth)
    for note in film.notes:
        print(f"note: {note}")
    taken = sum(shot["selected"] for shot in summary["shots"])
    print(
        f"{_printable(str(args.out))}: {summary['selected_s']:.1f} s of "
        f"{summary['duration_s']:.1f} s in {taken} {'shot' if taken == 1 else 'shots'}; look at "
        f"{_printable(str(args.out / 'report.html'))}"
    )
    return 0


def _say(what: str) -> None:
    """Tells a person who watches what takes its time now; a log needs only the outcome."""
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags, checked as far as they can be without opening a file."""
    parser = argparse.ArgumentParser(
        prog="python -m deevisum_jax.summarize",
        description="Cuts a video down to the moments that matter, by what is seen, said and "
        "heard in it.\nThe model is one that `python -m deevisum_jax.main` has trained.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "video",
        metavar="VIDEO",
        help="mp4, mkv, webm, avi: what FFmpeg decodes (./-x.mp4 for -x.mp4)",
    )
    add(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        metavar="RUN",
        help="workdir of a training run; its best checkpoint judges",
    )
    add(
        "--out",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="new or empty folder; what it gets is listed below",
    )
    add(
        "--title",
        metavar="TEXT",
        help="what the video is about; the model reads it (default: file name)",
    )
    add(
        "--subtitles",
        metavar="FILE",
        help="what is said in it, as .srt or .vtt, or none (default: a file of the video's name "
        "beside it, such as talk.srt or talk.en.vtt, else a text track inside, else none)",
    )
    add(
        "--budget",
        type=float,
        default=select.DEFAULT_BUDGET,
        metavar="SHARE",
        help="largest share of the video to keep, above 0 and at most 1 (default: %(default)s)",
    )
    add(
        "--exit_threshold",
        type=_threshold,
        metavar="off|P",
        help="judge each segment at the first of the model's exits that is this sure of it, a "
        "probability from 0.5 to 1; off: always at the last (default: the run's "
        "eval.exit_threshold)",
        default=_THE_RUNS,
    )
    args = parser.parse_args(argv)
    if not 0 < args.budget <= 1:
        parser.error(f"argument --budget: {args.budget} is not above 0 and at most 1")
    return args


def _threshold(text: str) -> float | None:
    if text == "off":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.5 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither off nor a number from 0.5 to 1")
    return value


class Student:
    """A trained run, ready to score any video on all devices of this process."""

    def __init__(self, run: pathlib.Path) -> None:
        """Loads the best checkpoint of a run.

        Raises:
          UserError: `run` is no workdir of a run, or misses a part.
        """
        run = run.expanduser()
        if missing := runs.missing_parts(run):
            raise UserError(
                f"{run} is no workdir of a training run, it lacks {', '.join(missing)}; give "
                "--checkpoint the folder that deevisum_jax.main was given as --workdir"
            )
        self.config = runs.load_config(run)
        tokens = tokenizer.load_tokenizer(run / runs.TOKENIZER_FILE)
        template = prompts.load_template(str(run / runs.TEMPLATE_FILE))
        self.model_config = experiment.model_config(self.config, tokens)
        self.encoder = experiment.make_encoder(
            self.config, tokens, template, self.model_config.img.image_size
        )
        shapes = paligemma2.abstract_params(self.model_config)
        self._mesh = sharding.fitting_mesh(shapes)
        shardings = sharding.param_shardings(shapes, self._mesh)
        abstract = sharding.abstract(shapes, shardings)
        with checkpoints.Checkpoints(run / runs.CHECKPOINT_FOLDER) as saved:
            params = saved.restore_params(saved.best_step, abstract)
        score_fn = scoring.make_score_fn(self.model_config, shardings, self._mesh)
        self._score_fn = functools.partial(score_fn, params)

    def score(self, video: Video) -> tuple[np.ndarray, scoring.SegmentScores]:
        """Segment borders `float[M, 2]` in seconds, and their scores at every exit.

        A batch is the run's `eval.batch_size`, no larger than the video needs, rounded up to what
        the devices divide.
        """
        bounds = segment_bounds(video.duration_s, self.config.data.segment_s)
        rows = min(self.config.eval.batch_size, len(bounds))
        batches = pipeline.in_order(
            pipeline.VideoSegments(video, bounds, self.encoder),
            batch_size=-(-rows // self._mesh.size) * self._mesh.size,
        )
        with jax.set_mesh(self._mesh):
            return bounds, scoring.score_videos(self._score_fn, batches, self._mesh)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """A decoded file: what the model sees and hears of it, and its native timeline."""

    path: str
    video: Video
    decoded: DecodedVideo
    notes: tuple[str, ...]  # what a person should know about the file, in sentences


def read_film(
    path: str,
    *,
    size: int,
    resize: str = "bilinear",
    title: str | None = None,
    subtitles_path: str | None = None,
) -> Film:
    """Decodes pictures, sound and subtitles.

    Args:
      path: the file.
      size: height and width of the decoded pictures, pixels.
      resize: how they come to it, bilinear or bicubic.
      title: what it is about; None takes the file's name.
      subtitles_path: None looks beside and inside the file, "none" takes none.

    Raises:
      UserError: the file holds no picture that decodes, or the subtitles are malformed.
    """
    # Quick, so a mistake shows at once.
    cues = [] if subtitles_path == "none" else subtitles.load_subtitles(path, subtitles_path)
    decoded = decode_video(path, frame_rate=_FRAME_RATE, size=(size, size), resize=resize)
    waveform = audio.decode_audio(path)
    info, notes = decoded.info, list(decoded.info.notes)
    if waveform is None:
        notes.append("no sound: judged by picture and text")
    elif not np.any(waveform):
        notes.append("the sound is silent throughout")
    if info.n_frames == 1:
        notes.append("the video is a single picture")
    if info.width % 2 or info.height % 2:
        width, height = info.width // 2 * 2, info.height // 2 * 2
        notes.append(
            f"the film is {width} x {height}, its source {info.width} x {info.height}: "
            "H.264 needs even sizes"
        )
    video = Video(
        title=_printable(title if title is not None else pathlib.Path(path).stem.replace("_", " ")),
        duration_s=info.duration_s,
        frames=decoded.frames,
        frame_times=decoded.frame_times,
        cues=cues,
        waveform=waveform,
    )
    return Film(path=str(path), video=video, decoded=decoded, notes=tuple(notes))


def summarize(
    film: Film, student: Student, *, budget: float, threshold: float | None
) -> dict[str, Any]:
    """Scores a film and chooses its shots; the content of summary.json.

    Args:
      film: of `read_film`.
      student: the model.
      budget: share of the film to keep.
      threshold: exit threshold, None = every segment runs every layer.

    Raises:
      UserError: the film is too short for a summary of this budget, or its pictures stay longer
        than that.
    """
    duration_s = film.video.duration_s
    budget_s = budget * duration_s
    least_s = min(_MIN_SUMMARY_S, duration_s)
    if budget_s < least_s:
        raise UserError(
            f"{film.path} is {duration_s:.2f} s long, so a summary of {100 * budget:g} % would "
            f"last {budget_s:.2f} s, under {_MIN_SUMMARY_S} s; raise --budget to "
            + "; ".join((_share(_MIN_SUMMARY_S, duration_s), *film.notes))
        )
    # ---- Segments: scores and exits ----
    bounds, scores = student.score(film.video)
    last = np.full(len(bounds), len(student.model_config.exit_layers) - 1)
    exits = last if threshold is None else scoring.exit_index(scores.summary_prob, threshold)
    segment_scores = scoring.at_exit(scores, exits)
    # ---- Shots: found on the pictures, valued by the segments they lie in ----
    native = film.decoded
    found = shots.detect_shots(
        native.frames,
        native.frame_times,
        native_times=native.native_times,
        change=native.change,
        max_shot_s=shots.shot_limit_s(duration_s, budget),
        duration_s=duration_s,
    )
    frame_scores = segment_scores[np.searchsorted(bounds[1:, 0], native.native_times, "right")]
    shot_scores = select.shot_scores(frame_scores, found)
    # ---- Choice: what fits the budget ----
    lengths_s = np.array([shot.end_s - shot.start_s for shot in found])
    chosen = select.select_film(shot_scores, lengths_s, budget_s)
    # Shots are split to fit the budget, but a single picture that outlasts it is not.
    too_long = lengths_s[lengths_s > budget_s]
    if too_long.size and lengths_s[chosen].sum() < least_s / 2:
        raise UserError(
            f"the pictures of {film.path} stay on screen for {too_long.min():.2f} s and more, "
            f"longer than a summary of {100 * budget:g} % ({budget_s:.2f} s); raise --budget to "
            + "; ".join((_share(too_long.min(), duration_s), *film.notes))
        )
    kept = [(shot.start_s, shot.end_s) for shot, taken in zip(found, chosen, strict=True) if taken]
    inside = [
        sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in kept)
        for start, end in bounds
    ]
    return {
        "video": _printable(film.path),
        "title": film.video.title,
        "duration_s": duration_s,
        "budget": budget,
        "exit_threshold": threshold,
        "segments": [
            {
                "start_s": float(start),
                "end_s": float(end),
                "score": float(score),
                "exit_layer": student.model_config.exit_layers[exit_],
                "selected": bool(held > (end - start) / 2),  # most of it is in the summary
            }
            for (start, end), score, exit_, held in zip(
                bounds, segment_scores, exits, inside, strict=True
            )
        ],
        "shots": [
            {
                "start_s": shot.start_s,
                "end_s": shot.end_s,
                "score": float(score),
                "selected": bool(taken),
            }
            for shot, score, taken in zip(found, shot_scores, chosen, strict=True)
        ],
        "selected_s": float(sum(end - start for start, end in kept)),
        "notes": list(film.notes),
    }


def _printable(text: str) -> str:
    """What can be tokenized, printed and written: file names may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _share(length_s: float, duration_s: float) -> str:
    """The least budget, in whole hundredths, that holds a length."""
    return f"{min(1.0, math.ceil(100 * length_s / duration_s) / 100):g}"


def write_outputs(
    film: Film, summary: dict[str, Any], folder: pathlib.Path, *, num_layers: int
) -> None:
    """Writes summary.mp4, summary.json, keyframes/ and report.html into `folder`."""
    kept = [(shot["start_s"], shot["end_s"]) for shot in summary["shots"] if shot["selected"]]
    render.render_summary(film.path, kept, folder / "summary.mp4")
    times = render.keyframe_times(
        kept,
        np.array([(segment["start_s"], segment["end_s"]) for segment in summary["segments"]]),
        np.array([segment["score"] for segment in summary["segments"]]),
    )
    stills = render.save_keyframes(film.path, times, folder / "keyframes")
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    report.write_video_report(
        folder / "report.html",
        summary,
        title=film.video.title,
        keyframes=stills,
        transcript=[(cue.start_s, cue.end_s, cue.text) for cue in film.video.cues],
        notes=film.notes,
        film="summary.mp4",
        num_layers=num_layers,
    )


if __name__ == "__main__":
    sys.exit(main())
