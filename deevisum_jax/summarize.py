"""Video in, summary out: `python -m deevisum_jax.summarize VIDEO --checkpoint RUN --out DIR`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from deevisum_jax import checkpoints, experiment, sharding
from deevisum_jax import config as config_lib
from deevisum_jax.data import audio, pipeline, subtitles, tokenizer
from deevisum_jax.data.segments import Video, segment_bounds
from deevisum_jax.data.video import DecodedVideo, decode_video
from deevisum_jax.errors import UserError, exits_on_user_error
from deevisum_jax.files import write_whole
from deevisum_jax.inference import scoring
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import render, report, select, shots

_FRAME_RATE = 2.0  # frames per second looked at, the rate of the stored data sets
_MIN_SUMMARY_S = 0.5  # below this there is nothing to watch
_THE_RUNS = object()  # stands for the run's own exit threshold; None is "off"
_EXAMPLES = """\
examples:
  python -m deevisum_jax.summarize holiday.mp4 --checkpoint runs/quickstart --out out/
  python -m deevisum_jax.summarize talk.mkv --checkpoint runs/quickstart --out out/ \\
      --title "Keynote" --subtitles talk.srt --budget 0.1 --exit_threshold off

DIR gets summary.mp4, summary.json, report.html and keyframes/. It appears when all of it is done.
Exit status: 0 done, 2 a mistake in what was given (one line says which, and the next step).
"""


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    with _whole_folder(args.out) as folder, jax.set_mesh(sharding.make_mesh()):
        student = Student(args.checkpoint)
        film = read_film(
            args.video,
            size=student.model_config.img.image_size,
            title=args.title,
            subtitles_path=args.subtitles,
        )
        threshold = student.config.eval.exit_threshold
        if args.exit_threshold is not _THE_RUNS:
            threshold = args.exit_threshold
        summary = summarize(film, student, budget=args.budget, threshold=threshold)
        write_outputs(film, summary, folder, num_layers=student.model_config.llm.depth)
    print(
        f"{args.out}: {summary['selected_s']:.1f} s of {summary['duration_s']:.1f} s in "
        f"{sum(shot['selected'] for shot in summary['shots'])} shots"
    )
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags, checked as far as they can be without opening a file."""
    parser = argparse.ArgumentParser(
        prog="python -m deevisum_jax.summarize",
        description="Cuts a video down to the moments that matter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("video", metavar="VIDEO", help="mp4, mkv, webm, avi: what FFmpeg decodes")
    add(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        metavar="RUN",
        help="workdir of a training run; its best checkpoint scores",
    )
    add(
        "--out",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="new or empty folder for the summary",
    )
    add("--title", help="what the video is about (default: the file's name)")
    add(
        "--subtitles",
        metavar="FILE",
        help=".srt or .vtt (default: one beside the video or inside it, if any)",
    )
    add(
        "--budget",
        type=float,
        default=select.DEFAULT_BUDGET,
        metavar="SHARE",
        help="share of the video to keep, above 0 and at most 1 (default: %(default)s)",
    )
    add(
        "--exit_threshold",
        type=_threshold,
        metavar="off|P",
        help="leave the model at the first exit whose class is at least this probable, 0.5 to 1; "
        "off: always run every layer (default: the run's eval.exit_threshold)",
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
    """A trained run, ready to score any video."""

    def __init__(self, run: pathlib.Path) -> None:
        """Loads the best checkpoint of a run onto the current mesh.

        Raises:
          UserError: `run` is no workdir of a run, or misses a part.
        """
        self.config = config_lib.load(run / experiment.CONFIG_FILE)
        tokens = tokenizer.load_tokenizer(run / experiment.TOKENIZER_FILE)
        self.model_config = experiment.model_config(self.config, tokens)
        self.encoder = experiment.make_encoder(
            self.config, tokens, self.model_config.img.image_size
        )
        self._mesh = jax.sharding.get_mesh()
        shapes = paligemma2.abstract_params(self.model_config)
        shardings = sharding.param_shardings(shapes, self._mesh)
        abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        )
        with checkpoints.Checkpoints(run / experiment.CHECKPOINT_FOLDER) as saved:
            params = saved.restore_params(saved.best_step, abstract)
        score_fn = scoring.make_score_fn(self.model_config, shardings, self._mesh)
        self._score_fn = functools.partial(score_fn, params)

    def score(self, video: Video) -> tuple[np.ndarray, scoring.SegmentScores]:
        """Segment borders `float[M, 2]` in seconds, and their scores at every exit."""
        bounds = segment_bounds(video.duration_s, self.config.data.segment_s)
        batches = pipeline.in_order(
            pipeline.VideoSegments(video, bounds, self.encoder),
            batch_size=self.config.eval.batch_size,
        )
        return bounds, scoring.score_videos(self._score_fn, batches, self._mesh)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """A decoded file: what the model sees and hears of it, and its native timeline."""

    path: str
    video: Video
    decoded: DecodedVideo
    notes: tuple[str, ...]  # what a person should know about the file, in sentences


def read_film(
    path: str, *, size: int, title: str | None = None, subtitles_path: str | None = None
) -> Film:
    """Decodes pictures, sound and subtitles.

    Args:
      path: the file.
      size: height and width of the decoded pictures, pixels.
      title: what it is about; None takes the file's name.
      subtitles_path: None looks beside and inside the file.

    Raises:
      UserError: the file holds no picture that decodes, or the subtitles are malformed.
    """
    decoded = decode_video(path, frame_rate=_FRAME_RATE, size=(size, size))
    waveform = audio.decode_audio(path)
    notes = decoded.info.notes
    if waveform is None:
        notes += ("The file has no sound; it was judged by picture and text.",)
    elif not np.any(waveform):
        notes += ("The sound is silent throughout.",)
    video = Video(
        title=title if title is not None else pathlib.Path(path).stem.replace("_", " "),
        duration_s=decoded.info.duration_s,
        frames=decoded.frames,
        frame_times=decoded.frame_times,
        cues=subtitles.load_subtitles(path, subtitles_path),
        waveform=waveform,
    )
    return Film(path=str(path), video=video, decoded=decoded, notes=notes)


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
      UserError: the film is too short for a summary of this budget.
    """
    duration_s = film.video.duration_s
    if budget * duration_s < min(_MIN_SUMMARY_S, duration_s):
        raise UserError(
            f"{film.path} is {duration_s:.2f} s long, so a summary of {100 * budget:g} % would "
            f"last {budget * duration_s:.2f} s, under {_MIN_SUMMARY_S} s; raise --budget to at "
            f"least {min(1.0, math.ceil(100 * _MIN_SUMMARY_S / duration_s) / 100):g}"
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
    # ---- Choice: a knapsack in milliseconds, since frame rates may vary. A shot is worth its score
    # times its length: with the bare means of the published evaluations, scraps would win ----
    lengths_s = np.array([shot.end_s - shot.start_s for shot in found])
    chosen = select.select_summary(
        shot_scores * lengths_s,
        np.ceil(1000 * lengths_s).astype(int),
        math.floor(1000 * duration_s),
        budget,
    )
    kept = [(shot.start_s, shot.end_s) for shot, taken in zip(found, chosen, strict=True) if taken]
    inside = [
        sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in kept)
        for start, end in bounds
    ]
    return {
        "video": film.path,
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


@contextlib.contextmanager
def _whole_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `out` only when all went well.

    Raises:
      UserError: `out` is a file, holds something, or cannot be written.
    """
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder; give --out a new one")
        shutil.rmtree(partial, ignore_errors=True)  # left behind by a run that was killed
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); give --out a folder that can"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
