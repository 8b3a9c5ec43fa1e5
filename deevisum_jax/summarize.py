"""Video in, summary out: `python -m deevisum_jax.summarize VIDEO --checkpoint RUN --out DIR`.

With `--manifest` many videos, by one process or by several that know nothing of each other while
they work.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import absl.logging
import jax
import numpy as np
from etils import epath

from deevisum_jax import (
    checkpoints,
    corpus,
    distributed,
    experiment,
    files,
    media,
    preemption,
    runs,
    sharding,
)
from deevisum_jax.config import Config
from deevisum_jax.convert import two_towers as convert_two_towers
from deevisum_jax.corpus import Corpus, Item, VideoError, printable
from deevisum_jax.data import audio, pipeline, prompts, siglip_text, subtitles, tokenizer
from deevisum_jax.data.segments import Video, segment_bounds
from deevisum_jax.data.spool import SoundSpool
from deevisum_jax.data.video import DecodedVideo, View, decode_video
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.files import whole_folder, write_whole, writing
from deevisum_jax.inference import long_video, staged
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.long_video import KeyframeFinder
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models import paligemma2, two_towers
from deevisum_jax.models.two_towers import TwoTowersConfig
from deevisum_jax.summary import render, report, select, shots, storyboard
from deevisum_jax.typing import ExitedScores

# Segment borders float[M, 2] in seconds, and what is said of each segment.
Scored = tuple[np.ndarray, ExitedScores]

EXIT_SOME_FAILED = 1

_FRAME_RATE = 2.0  # frames per second looked at, the rate of the stored data sets
_MIN_SUMMARY_S = 0.5  # below this there is nothing to watch
_AUTO, _OFF = "auto", "off"
_QUERY_WEIGHT = 0.5
_QUERY_TOKENIZER = "spiece.model"
_EXAMPLES = """\
examples:
  python -m deevisum_jax.summarize holiday.mp4 --checkpoint runs/quickstart --out holiday/
  python -m deevisum_jax.summarize talk.mkv --checkpoint runs/quickstart --out talk/ \\
      --title "Keynote" --subtitles talk.srt --budget 0.1 --exit_threshold off
  python -m deevisum_jax.summarize party.mp4 --checkpoint runs/quickstart --out party/ \\
      --query "blowing out the candles" --query_model siglip-base-patch16-224/
  python -m deevisum_jax.summarize --manifest videos.csv --checkpoint runs/quickstart --out all/

what DIR gets, all of it or nothing:
  report.html    a page to look at: the film, the scores over time, every shot, the words
  summary.mp4    the chosen shots in order, H.264 and AAC
  summary.json   the score and the exit of every segment, every shot and whether it was chosen
  keyframes/     one still of each chosen shot
  storyboard/    with --num_keyframes or --query: stills that differ, and contact_sheet.jpg of them

Decoded pictures and sound wait in temporary files (TMPDIR); an hour takes 1.2 GB at 224 pixels.

what DIR gets with --manifest:
  ID/            the same for each video
  index.html     a page with links to all; index.json has its numbers
  failures.csv   the videos that failed, and why
The same command again goes on where it was stopped, and tries what failed again.
Delete DIR/ID to have a video made anew.

a manifest is a CSV file, with these columns or some of them in any order:
  video          a path, relative to the manifest's folder, or an address such as gs://bucket/a.mp4
  id             names its folder in DIR (default: the file's name without its ending)
  title, subtitles   as the flags

Exit status: 0 done, 1 some videos of a manifest failed, 2 a mistake in what was given (a message
says which, and the next step), 75 stopped by a preemption notice (SIGTERM), 130 interrupted.
One of several processes ends with 0 where videos failed, as launchers stop all of them when one
ends with another status; it prints how many, and failures.csv has them.
"""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    args.checkpoint, args.out = files.locate(args.checkpoint), files.locate(args.out)
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    return _summarize_one(args) if args.manifest is None else _summarize_many(args)


def _summarize_one(args: argparse.Namespace) -> int:
    with preemption.Notice(), contextlib.ExitStack() as stack:
        folder = stack.enter_context(whole_folder(args.out, corpus.MARKER))
        if files.in_bucket(args.video):
            _say(f"fetching {args.video}")
        path, words = _fetch(stack, args.video, args.subtitles)
        stack.enter_context(_named(path, args.video))
        stack.enter_context(_named(words, args.subtitles))
        # A file that is no video is better known before gigabytes of parameters are read.
        with media.open_media(path) as container:
            media.video_stream(container, path)
        _say(f"loading {args.checkpoint}")
        policy = policy_asked_for(
            args.exit_threshold, args.checkpoint, _run_config(args.checkpoint)
        )
        request = request_of(args)
        student = Student(args.checkpoint)
        finder = request and make_finder(request, student)
        _say(f"decoding {args.video}")
        film = read_film(
            path,
            size=student.model_config.img.image_size,
            resize=student.encoder.resize,
            title=args.title,
            subtitles_path=words,
            name=args.video,
            finder=finder,
        )
        _say(f"scoring {film.video.duration_s:.0f} s of video")
        summary = summarize(film, student, budget=args.budget, policy=policy, request=request)
        _say(f"writing {args.out}")
        with writing(args.out):
            write_outputs(film, summary, folder, num_layers=student.model_config.llm.depth)
    for note in film.notes:
        print(f"note: {note}")
    taken = sum(shot["selected"] for shot in summary["shots"])
    print(
        f"{printable(str(args.out))}: {summary['selected_s']:.1f} s of "
        f"{summary['duration_s']:.1f} s in {taken} {'shot' if taken == 1 else 'shots'}; look at "
        f"{printable(str(args.out / 'report.html'))}"
    )
    return 0


def _say(what: str) -> None:
    """Tells a person who watches what takes its time now; a log needs only the outcome."""
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr)


def policy_asked_for(
    asked: str | tuple[float, ...] | None, run: epath.Path, config: Config
) -> ExitPolicy:
    """When segments leave.

    Args:
      asked: as `--exit_threshold`: auto, off or thresholds; None = as the run was calibrated, or
        else as its config says.
      run: a run's folder.
      config: its config.

    Raises:
      UserError: auto is asked of a run that was not calibrated, or thresholds that do not fit it.
    """
    if asked == _OFF:
        return ExitPolicy.off(len(config.model.exit_layers))
    if asked not in (None, _AUTO):
        return ExitPolicy.of(asked, len(config.model.exit_layers), config.eval.exit_confidence)
    policy, calibration = runs.exit_policy(run, config)
    if asked == _AUTO and calibration is None:
        raise UserError(
            f"--exit_threshold auto: {run} was not calibrated; do so (python -m deevisum_jax.main "
            "... --mode calibrate), or give off or a threshold"
        )
    return policy


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
        nargs="?",
        metavar="VIDEO",
        help="mp4, mkv, webm, avi: what FFmpeg decodes (./-x.mp4 for -x.mp4)",
    )
    add(
        "--manifest",
        metavar="FILE",
        help="a list of many videos instead of one; described below",
    )
    add(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="workdir of a training run; its best checkpoint judges",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="new or empty folder, or address in a bucket; what it gets is listed below",
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
        metavar="auto|off|P",
        help="judge each segment at the first of the model's exits that is this sure of it, such "
        "as 0.9, or 0.99,off,0.8 for one after the other, by the run's eval.exit_confidence; off: "
        "always at the last; auto: as main --mode calibrate has chosen (default: auto if it has, "
        "else the run's eval.exit_threshold)",
    )
    add(
        "--query",
        metavar="TEXT",
        help="what to look for in the video, or in all of a manifest; needs --query_model",
    )
    add(
        "--query_model",
        metavar="FOLDER",
        help="a SigLIP with both towers as Hugging Face has it: config.json, model.safetensors, "
        "spiece.model",
    )
    add(
        "--query_weight",
        type=float,
        metavar="W",
        help="share of the query in the score of a segment, from 0 to 1; the rest is the model's "
        f"own (default: {_QUERY_WEIGHT})",
    )
    add(
        "--num_keyframes",
        type=int,
        metavar="K",
        help="stills of the storyboard, which differ from each other and answer the query, or are "
        "like the whole video without one; a video of fewer frames, at two per second, has all of "
        f"them there (default: {SelectionConfig().num_keyframes} with a --query, else none)",
    )
    distributed.add_flags(parser)
    args = parser.parse_args(argv)
    if (args.video is None) == (args.manifest is None):
        parser.error("give either one VIDEO or a --manifest")
    if args.manifest is None:
        for name in ("coordinator_address", "num_processes", "process_id"):
            if getattr(args, name) is not None:
                parser.error(f"argument --{name}: is for a --manifest, not for one VIDEO")
    else:
        for name in ("title", "subtitles"):
            if getattr(args, name) is not None:
                parser.error(f"argument --{name}: a --manifest has a column for it")
    if not 0 < args.budget <= 1:
        parser.error(f"argument --budget: {args.budget} is not above 0 and at most 1")
    _check_request(parser, args)
    return args


def _check_request(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.query is None:
        for name in ("query_model", "query_weight"):
            if getattr(args, name) is not None:
                parser.error(f"argument --{name}: is for a --query, which is not given")
    else:
        if not siglip_text.canonicalize_text(args.query):
            parser.error(f"argument --query: {args.query!r} has no word in it")
        if args.query_model is None:
            parser.error("argument --query: give --query_model, too, the folder of a SigLIP")
        if args.query_weight is None:
            args.query_weight = _QUERY_WEIGHT
        if not 0 <= args.query_weight <= 1:
            parser.error(f"argument --query_weight: {args.query_weight} is not within [0, 1]")
    if args.num_keyframes is not None and args.num_keyframes < 1:
        parser.error(f"argument --num_keyframes: {args.num_keyframes} is not at least 1")


def _threshold(text: str) -> str | tuple[float, ...]:
    if text in (_AUTO, _OFF):
        return text
    try:
        values = tuple(None if part == _OFF else float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(value is None or 0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto nor off, nor a number from 0 to 1, nor several with commas"
        )
    return tuple(math.inf if value is None else value for value in values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """What to look for, as a model takes it."""

    text: str
    weight: float  # share of the query in the score of a segment
    folder: epath.Path  # of the model, as Hugging Face has it
    model: TwoTowersConfig
    resize: str  # how it wants pictures resized
    tokens: np.ndarray  # int32[T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of a video beside its summary: a storyboard, and what to look for."""

    selection: SelectionConfig
    query: Query | None = None


def request_of(args: argparse.Namespace) -> Request | None:
    """What flags ask for; None = neither a query nor keyframes.

    Raises:
      UserError: the query's model is no SigLIP, its tokenizer is another's, or it takes no query of
        this length.
    """
    if args.query is None and args.num_keyframes is None:
        return None
    given = {} if args.num_keyframes is None else {"num_keyframes": args.num_keyframes}
    query = None
    if args.query is not None:
        text, folder = printable(args.query), files.locate(args.query_model)
        query = read_query(text, folder, args.query_weight)
    return Request(selection=SelectionConfig(**given), query=query)


def read_query(text: str, folder: epath.Path, weight: float) -> Query:
    """A query in the tokens of a model; its weights are not read.

    Raises:
      UserError: as `request_of`.
    """
    model = convert_two_towers.read_config(folder)
    path = folder / _QUERY_TOKENIZER
    tokens = siglip_text.SiglipTokenizer(path, text_len=model.txt.text_len)
    if tokens.vocab_size != model.txt.vocab_size:
        raise UserError(
            f"{path} has {tokens.vocab_size} pieces, and the text tower beside it takes "
            f"{model.txt.vocab_size}; give --query_model a folder whose files belong together"
        )
    try:
        encoded = tokens.encode_whole(text)
    except UserError as error:
        raise UserError(f"--query: {error}") from None
    return Query(
        text=text,
        weight=weight,
        folder=folder,
        model=model,
        resize=convert_two_towers.read_resize(folder, model.img.image_size),
        tokens=encoded,
    )


def make_finder(request: Request, student: Student) -> KeyframeFinder:
    """Finds keyframes by the query, or without one by what the student's image tower sees.

    Raises:
      UserError: the weights of the query's model are missing, damaged, or another model's.
    """
    mesh, query = long_video.device_mesh(), request.query
    if query is None:
        return long_video.by_mean(
            student.model_config,
            student.params,
            resize=student.encoder.resize,
            config=request.selection,
            mesh=mesh,
        )
    _say(f"loading {query.folder}")
    whole = long_video.on_every_device(mesh)
    shardings = jax.tree.map(lambda _: whole, two_towers.abstract_params(query.model))
    params, _ = convert_two_towers.load(query.folder, query.model, shardings)
    return long_video.by_query(
        query.model,
        params,
        query.tokens,
        resize=query.resize,
        config=request.selection,
        mesh=mesh,
    )


class Student:
    """A trained run, ready to score any video on the devices of this process."""

    def __init__(self, run: pathlib.Path | epath.Path) -> None:
        """Loads the best checkpoint of a run.

        Raises:
          UserError: `run` is no workdir of a run, or misses a part.
        """
        self._run = run
        self.config = _run_config(run)
        tokens = tokenizer.load_tokenizer(run / runs.TOKENIZER_FILE)
        template = prompts.load_template(run / runs.TEMPLATE_FILE)
        self.model_config = experiment.model_config(self.config, tokens)
        self.encoder = experiment.make_encoder(
            self.config, tokens, template, self.model_config.img.image_size
        )
        shapes = paligemma2.abstract_params(self.model_config)
        self.mesh = sharding.fitting_mesh(shapes, devices=jax.local_devices())
        self.param_shardings = sharding.param_shardings(shapes, self.mesh)
        abstract = sharding.abstract(shapes, self.param_shardings)
        with checkpoints.Checkpoints(run / runs.CHECKPOINT_FOLDER) as saved:
            self.params = saved.restore_params(saved.best_step, abstract)
        self.scorer = staged.StagedScorer(self.model_config, self.param_shardings, self.mesh)

    def score(self, video: Video, policy: ExitPolicy) -> Scored:
        """Scores one video; a batch is no larger than it needs.

        Args:
          video: of any length.
          policy: when a segment leaves; what is compiled for one serves the next.

        Raises:
          UserError: the scores are no numbers.
          VideoError: this video's segments cannot be made; its cause says why.
        """
        num_segments = len(segment_bounds(video.duration_s, self.config.data.segment_s))
        rows = min(self.config.eval.batch_size, num_segments)
        with contextlib.closing(self._score([video], policy, rows)) as results:
            [result] = results
        if isinstance(result, VideoError):
            raise result
        return result

    def score_all(
        self, videos: Iterable[Video], policy: ExitPolicy
    ) -> Generator[Scored | VideoError, None, None]:
        """Scores videos as one stream, so that batches are full however short the videos are.

        What is said of a video does not depend on the others. Who is not sure waits for segments of
        the videos to come; at the end of `videos` nobody waits any more.

        Args:
          videos: each is asked for when there is room for its segments.
          policy: when a segment leaves; what is compiled for one serves the next.

        Yields:
          In the order of the videos, each when its last segment has left: as `score`, or why its
          segments cannot be made, as the cause of a `VideoError`.

        Raises:
          UserError: the scores are no numbers.
        """
        return self._score(videos, policy, self.config.eval.batch_size)

    def _score(
        self, videos: Iterable[Video], policy: ExitPolicy, rows: int
    ) -> Generator[Scored | VideoError, None, None]:
        """As `score_all`, in batches of so many rows, or what the devices divide above that."""
        under_way: dict[int, _UnderWay] = {}  # by number, in order

        def begun() -> Iterator[_UnderWay]:
            for number, video in enumerate(videos):
                bounds = segment_bounds(video.duration_s, self.config.data.segment_s)
                segments = pipeline.VideoSegments(video, bounds, self.encoder)
                under_way[number] = _UnderWay(number, bounds, segments)
                yield under_way[number]

        def finished() -> Iterator[Scored | VideoError]:
            while under_way and under_way[first := next(iter(under_way))].is_finished:
                yield self._result(under_way.pop(first))  # no name holds its pictures meanwhile

        maker = ThreadPoolExecutor(1)
        try:
            batches = _packed(begun(), maker, -(-rows // self.mesh.size) * self.mesh.size)
            stream = self.scorer.stream(self.params, batches, policy)
            while True:
                with jax.set_mesh(self.mesh):  # not around a `yield`
                    exited = next(stream, None)
                if exited is None:
                    break
                numbers, segments, scores = exited
                # Of those that have failed some may still come; nobody asks for them.
                for number in set(numbers.tolist()) & under_way.keys():
                    theirs = numbers == number
                    scores_of = jax.tree.map(lambda a, rows=theirs: a[rows], scores)
                    under_way[number].take(segments[theirs], scores_of)
                yield from finished()
            yield from finished()
        finally:
            maker.shutdown(cancel_futures=True)

    def _result(self, video: _UnderWay) -> Scored | VideoError:
        if video.error is not None:
            return VideoError(video.error)
        if not np.isfinite(video.scores.importance).all():
            raise UserError(
                f"the checkpoint of {self._run} gives scores that are no finite numbers; train it "
                "again, with a lower learning rate"
            )
        return video.bounds, video.scores


class _UnderWay:
    """A video whose segments are being scored."""

    def __init__(self, number: int, bounds: np.ndarray, segments: Sequence[pipeline.Row]) -> None:
        self.number, self.bounds = number, bounds
        self.error: Exception | None = None  # why one of its segments cannot be made
        self._segments, self._num_left = segments, len(bounds)
        self.scores = ExitedScores(
            importance=np.empty(len(bounds), np.float32),
            summary_prob=np.empty(len(bounds), np.float32),
            exit_index=np.empty(len(bounds), np.int64),
        )

    @property
    def is_finished(self) -> bool:
        return self._num_left == 0 or self.error is not None

    def row(self, segment: int) -> pipeline.Row:
        """Of a batch."""
        return self._segments[segment] | {"video_id": np.int32(self.number)}

    def take(self, segments: np.ndarray, scores: ExitedScores) -> None:
        """Scores of some, which have left."""
        for field in dataclasses.fields(scores):
            getattr(self.scores, field.name)[segments] = getattr(scores, field.name)
        self._num_left -= len(segments)


def _packed(
    videos: Iterable[_UnderWay], maker: ThreadPoolExecutor, batch_size: int
) -> Iterator[pipeline.Row]:
    """Their segments in full batches, over the borders of videos; the last is filled up.

    The rows of a batch are made by `maker` while the one before is used. What goes wrong in making
    one is the video's `error`, and no more of it is made.
    """

    def coming() -> Iterator[tuple[_UnderWay, Future[pipeline.Row]]]:
        ahead: collections.deque[tuple[_UnderWay, Future[pipeline.Row]]] = collections.deque()
        for video in videos:
            for segment in range(len(video.bounds)):
                if video.error is not None:
                    break
                ahead.append((video, maker.submit(video.row, segment)))
                if len(ahead) > batch_size:
                    yield ahead.popleft()
        while ahead:
            yield ahead.popleft()

    rows: list[pipeline.Row] = []
    for video, row in coming():
        try:
            rows.append(row.result())
        except Exception as error:
            video.error = error
        if len(rows) == batch_size:
            yield from pipeline.in_order(rows, batch_size=batch_size)
            rows = []
    if rows:
        yield from pipeline.in_order(rows, batch_size=batch_size)


def _run_config(run: pathlib.Path | epath.Path) -> Config:
    """That of a run.

    Raises:
      UserError: this is no workdir of a run, or misses a part.
    """
    if missing := runs.missing_parts(run):
        raise UserError(
            f"{run} is no workdir of a training run, it lacks {', '.join(missing)}; give "
            "--checkpoint the folder that deevisum_jax.main was given as --workdir"
        )
    return runs.load_config(run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """A decoded file: what the model sees and hears of it, and its native timeline."""

    path: str
    name: str  # where the file really is, if `path` is a copy
    video: Video
    decoded: DecodedVideo | None  # None after `without_pictures`
    notes: tuple[str, ...]  # what a person should know about the file, in sentences
    found: long_video.Found | None = None  # of its frames, if they were looked at for keyframes

    def num_bytes(self) -> int:
        """Of pictures and sound, in temporary files."""
        waveform = self.video.waveform
        return self.decoded.frames.nbytes + (0 if waveform is None else waveform.nbytes)

    def without_pictures(self) -> Film:
        """What is still needed when the shots are chosen."""
        video = dataclasses.replace(self.video, frames=(), waveform=None)
        return dataclasses.replace(self, video=video, decoded=None)


def read_film(
    path: str | os.PathLike,
    *,
    size: int,
    resize: str = "bilinear",
    title: str | None = None,
    subtitles_path: str | os.PathLike | None = None,
    name: str | None = None,
    finder: KeyframeFinder | None = None,
) -> Film:
    """Decodes pictures, sound and subtitles; pictures and sound go to temporary files.

    Args:
      path: the file.
      size: height and width of the decoded pictures, pixels.
      resize: how they come to it, bilinear or bicubic.
      title: what it is about; None takes the file's name.
      subtitles_path: None looks beside and inside the file, "none" takes none.
      name: what to call the file; None = its path.
      finder: looks for keyframes meanwhile; None = nobody does.

    Raises:
      UserError: the file holds no picture that decodes, or the subtitles are malformed, or the disk
        of temporary files is full.
    """
    # Quick, so a mistake shows at once.
    cues = [] if subtitles_path == "none" else subtitles.load_subtitles(path, subtitles_path)
    watch, others = None, []
    if finder is not None:
        watch = finder.watch()
        seen_size = (finder.image_size, finder.image_size)
        others = [View(see=watch.see, size=seen_size, resize=finder.resize)]
    decoded = decode_video(
        path, frame_rate=_FRAME_RATE, size=(size, size), resize=resize, others=others
    )
    found = None if watch is None else watch.finish()
    waveform = SoundSpool()
    if not audio.hear_audio(path, waveform.write):
        waveform = None
    info, notes = decoded.info, list(decoded.info.notes)
    if waveform is None:
        notes.append("no sound: judged by picture and text")
    elif waveform.is_silent:
        notes.append("the sound is silent throughout")
    if info.n_frames == 1:
        notes.append("the video is a single picture")
    if info.width % 2 or info.height % 2:
        width, height = info.width // 2 * 2, info.height // 2 * 2
        notes.append(
            f"the film is {width} x {height}, its source {info.width} x {info.height}: "
            "H.264 needs even sizes"
        )
    if found is not None and len(found.index) < finder.config.num_keyframes:
        notes.append(
            f"the storyboard has all {len(found.index)} frames of the video, at {_FRAME_RATE:g} a "
            f"second, which are fewer than {finder.config.num_keyframes}"
        )
    video = Video(
        title=printable(title if title is not None else pathlib.Path(path).stem.replace("_", " ")),
        duration_s=info.duration_s,
        frames=decoded.frames,
        frame_times=decoded.frame_times,
        cues=cues,
        waveform=waveform,
    )
    name = str(path if name is None else name)
    return Film(
        path=str(path), name=name, video=video, decoded=decoded, notes=tuple(notes), found=found
    )


def summarize(
    film: Film,
    student: Student,
    *,
    budget: float,
    policy: ExitPolicy,
    request: Request | None = None,
) -> dict[str, Any]:
    """Scores a film and chooses its shots; the content of summary.json but for the keyframes.

    Args:
      film: of `read_film`.
      student: the model.
      budget: share of the film to keep.
      policy: when a segment leaves.
      request: what the film was read with; None = no storyboard.

    Raises:
      UserError: the film is too short for a summary of this budget, or its pictures stay longer
        than that.
    """
    _check_length(film, budget)
    try:
        bounds, scores = student.score(film.video, policy)
    except VideoError as error:
        raise error.__cause__ from None
    exit_layers = student.model_config.exit_layers
    return choose(film, bounds, scores, exit_layers, budget=budget, policy=policy, request=request)


def _check_length(film: Film, budget: float) -> None:
    duration_s = film.video.duration_s
    budget_s = budget * duration_s
    least_s = min(_MIN_SUMMARY_S, duration_s)
    if budget_s < least_s:
        raise UserError(
            f"{film.name} is {duration_s:.2f} s long, so a summary of {100 * budget:g} % would "
            f"last {budget_s:.2f} s, under {_MIN_SUMMARY_S} s; raise --budget to "
            + "; ".join((_share(_MIN_SUMMARY_S, duration_s), *film.notes))
        )


def choose(
    film: Film,
    bounds: np.ndarray,
    scores: ExitedScores,
    exit_layers: Sequence[int],
    *,
    budget: float,
    policy: ExitPolicy,
    request: Request | None = None,
) -> dict[str, Any]:
    """Chooses the shots of a film whose segments are scored, as `summarize` does."""
    segment_scores, told = _focused(film, bounds, scores.importance, request)
    duration_s = film.video.duration_s
    budget_s = budget * duration_s
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
    least_s = min(_MIN_SUMMARY_S, duration_s)
    too_long = lengths_s[lengths_s > budget_s]
    if too_long.size and lengths_s[chosen].sum() < least_s / 2:
        raise UserError(
            f"the pictures of {film.name} stay on screen for {too_long.min():.2f} s and more, "
            f"longer than a summary of {100 * budget:g} % ({budget_s:.2f} s); raise --budget to "
            + "; ".join((_share(too_long.min(), duration_s), *film.notes))
        )
    kept = [(shot.start_s, shot.end_s) for shot, taken in zip(found, chosen, strict=True) if taken]
    return {
        "video": printable(film.name),
        "title": film.video.title,
        "duration_s": duration_s,
        "budget": budget,
        "exit_policy": policy.to_json(),
        **_asked(request),
        "segments": [
            {
                "start_s": float(start),
                "end_s": float(end),
                "score": float(score),
                **more,
                "exit_layer": exit_layers[exit_],
                "selected": bool(held > (end - start) / 2),  # most of it is in the summary
            }
            for (start, end), score, more, exit_, held in zip(
                bounds,
                segment_scores,
                told,
                scores.exit_index,
                _seconds_kept(bounds, kept),
                strict=True,
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
        **_storyboard(film),
        "notes": list(film.notes),
    }


def _seconds_kept(bounds: np.ndarray, kept: Sequence[tuple[float, float]]) -> np.ndarray:
    """How much of each segment is in the summary, float[M].

    Args:
      bounds: float[M, 2], seconds, of segments one after the other.
      kept: what is in it, from and to which second; ascending, nothing twice.
    """
    found = np.zeros(len(bounds))
    starts, ends = bounds.T
    for start, end in kept:
        touched = slice(np.searchsorted(ends, start, "right"), np.searchsorted(starts, end))
        found[touched] += np.minimum(ends[touched], end) - np.maximum(starts[touched], start)
    return found


def _focused(
    film: Film, bounds: np.ndarray, importance: np.ndarray, request: Request | None
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Scores of segments float[M], with what a query makes of them; and what they are made of."""
    if request is None or request.query is None:
        return importance, [{} for _ in importance]
    relevance = long_video.segment_relevance(film.found.relevance, film.video.frame_times, bounds)
    told = [
        {"importance": float(own), "relevance": float(asked)}
        for own, asked in zip(importance, relevance, strict=True)
    ]
    return long_video.focus(importance, relevance, request.query.weight), told


def _asked(request: Request | None) -> dict[str, Any]:
    """A query, as summary.json has it."""
    if request is None or request.query is None:
        return {}
    return {"query": request.query.text, "query_weight": request.query.weight}


def _storyboard(film: Film) -> dict[str, Any]:
    """Keyframes, as summary.json has them but for their files."""
    if film.found is None:
        return {}
    found, times = film.found, film.video.frame_times
    keyframes = [
        {
            "time_s": float(times[index]),
            "relevance": float(found.relevance[index]),
            "filled": bool(is_filled),
        }
        for index, is_filled in zip(found.index, found.is_filled, strict=True)
    ]
    return {"storyboard": keyframes}


def _share(length_s: float, duration_s: float) -> str:
    """The least budget, in whole hundredths, that holds a length."""
    return f"{min(1.0, math.ceil(100 * length_s / duration_s) / 100):g}"


def write_outputs(
    film: Film, summary: dict[str, Any], folder: pathlib.Path, *, num_layers: int
) -> None:
    """Writes what the command promises into `folder`; storyboard/ if the summary has one."""
    kept = [(shot["start_s"], shot["end_s"]) for shot in summary["shots"] if shot["selected"]]
    render.render_summary(film.path, kept, folder / "summary.mp4")
    times = render.keyframe_times(
        kept,
        np.array([(segment["start_s"], segment["end_s"]) for segment in summary["segments"]]),
        np.array([segment["score"] for segment in summary["segments"]]),
    )
    wanted = [(times, folder / "keyframes")]
    if "storyboard" in summary:
        shown = [entry["time_s"] for entry in summary["storyboard"]]
        wanted.append((shown, folder / "storyboard"))
    stills, *boards = render.save_sets_of_keyframes(film.path, wanted)
    name = lambda path: path.relative_to(folder).as_posix()
    found = summary | {"keyframes": [name(still) for still in stills]}
    board, sheet = (boards[0] if boards else []), None
    if boards:
        entries = zip(summary["storyboard"], board, strict=True)
        found["storyboard"] = [entry | {"file": name(path)} for entry, path in entries]
        sheet = folder / "storyboard" / storyboard.CONTACT_SHEET
        storyboard.write_contact_sheet(board, found["storyboard"], sheet)
    write_whole(folder / corpus.MARKER, json.dumps(found, indent=2) + "\n")
    report.write_video_report(
        folder / "report.html",
        found,
        title=film.video.title,
        keyframes=stills,
        storyboard=board,
        contact_sheet=sheet and name(sheet),
        transcript=[(cue.start_s, cue.end_s, cue.text) for cue in film.video.cues],
        notes=film.notes,
        film="summary.mp4",
        num_layers=num_layers,
    )


# ---- Many videos ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What this process has before it."""

    corpus: Corpus
    items: list[Item]  # of all processes
    mine: list[Item]
    left: list[Item]  # of `mine`
    student: Student | None  # None where nothing is left for anybody
    policy: ExitPolicy
    request: Request | None = None
    finder: KeyframeFinder | None = None  # there with a request, where something is left


def _summarize_many(args: argparse.Namespace) -> int:
    """The command with --manifest.

    Returns:
      Its exit status; where videos failed, `EXIT_SOME_FAILED` from the only process, and 0 from one
      of several.
    """
    # Devices of this process alone are computed on, and gloo would ask the others all the same.
    jax.config.update("jax_cpu_collectives_implementation", None)
    distributed.initialize(args)
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    with preemption.Notice():
        task = _begin(args)
        num_failed = 0
        if task.left:
            steps = make_steps(task, budget=args.budget)
            # In one piece, since several processes may write to the same terminal.
            say = lambda line: sys.stderr.write(f"{who}{line}\n")
            num_failed = corpus.work(task.corpus, task.left, steps, say)
        damaged = task.corpus.write_index(task.items)
    now, all_ = len(task.left) - num_failed, len(task.mine)
    num_failed += sum(item.id in damaged for item in task.mine)
    of = f"{all_} videos" if not who else f"the {all_} videos of this process"
    page = printable(str(args.out / corpus.PAGE_FILE))
    print(f"{who}{all_ - num_failed} of {of} done ({now} now); look at {page}")
    if num_failed:
        where = printable(str(args.out / corpus.FAILURES_FILE))
        print(f"{who}{num_failed} failed: see {where}; the same command tries them again")
    # A launcher takes a process that ends otherwise for a reason to stop the others.
    return EXIT_SOME_FAILED if num_failed and not who else 0


@distributed.ends_together  # they part here, so that none waits for, or dies with, another
def _begin(args: argparse.Namespace) -> Task:
    """All that can be wrong with what was given; and the student, where there is work for it.

    Raises:
      UserError: something is.
    """
    # Which of them opens a checkpoint depends on it, and processes do so together.
    distributed.check_same("--exit_threshold", json.dumps(args.exit_threshold))
    items = corpus.read_manifest(files.locate(args.manifest))
    config, judge = _run_config(args.checkpoint), _identity(args.checkpoint)
    policy = policy_asked_for(args.exit_threshold, args.checkpoint, config)
    request = request_of(args)
    settings = judge | {
        "budget": args.budget,
        "exit_policy": policy.to_json(),
        **_request_settings(request),
    }
    rows = hashlib.sha256(repr(items).encode("utf-8", "surrogateescape")).hexdigest()
    distributed.check_same(
        "command", json.dumps(settings | {"out": str(args.out), "manifest": rows})
    )
    home = Corpus(args.out)
    claimed = {"run": str(args.checkpoint)} | settings
    done = set(distributed.on_main(lambda: home.claim(claimed, items)))
    home.check_shared()
    mine = corpus.share(items, jax.process_index(), jax.process_count())
    left = [item for item in mine if item.id not in done]
    home.clear(left)
    # By all or by none: processes open checkpoints together.
    finished = {item.id for item in items} <= done
    student = None if finished else Student(args.checkpoint)
    return Task(
        corpus=home,
        items=items,
        mine=mine,
        left=left,
        student=student,
        policy=policy,
        request=request,
        finder=None if request is None or student is None else make_finder(request, student),
    )


def _request_settings(request: Request | None) -> dict[str, Any]:
    """What of a request results depend on; None stands for what is not asked for."""
    names = ("num_keyframes", "query", "query_weight", "query_model")
    settings: dict[str, Any] = dict.fromkeys(names)
    if request is None:
        return settings
    settings["num_keyframes"] = request.selection.num_keyframes
    if request.query is not None:
        which = convert_two_towers.fingerprint(request.query.folder, [_QUERY_TOKENIZER])
        settings |= _asked(request) | {"query_model": which}
    return settings


def _identity(run: epath.Path) -> dict[str, Any]:
    """Which checkpoint of which run judges, wherever the run's folder is."""
    with checkpoints.Checkpoints(run / runs.CHECKPOINT_FOLDER) as saved:
        step = saved.best_step
    digest = hashlib.sha256()
    # Orbax notes there when it wrote the step.
    written = f"{runs.CHECKPOINT_FOLDER}/{step}/_CHECKPOINT_METADATA"
    for name in (runs.TOKENIZER_FILE, runs.TEMPLATE_FILE, written):
        with files.open_binary(run / name) as stream:
            digest.update(stream.read())
    return {"step": step, "digest": digest.hexdigest()[:16]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Opened:
    """A film, and the copies of its files that last until it is closed."""

    film: Film
    copies: contextlib.ExitStack
    summary: dict[str, Any] | None = None  # when it is scored

    @property
    def num_bytes(self) -> int:
        return self.film.num_bytes()

    def close(self) -> None:
        self.copies.close()


def make_steps(task: Task, *, budget: float) -> corpus.Steps[_Opened, _Opened]:
    """What is done with every video of a corpus."""
    student = task.student
    exit_layers = student.model_config.exit_layers

    def read(item: Item) -> _Opened:
        with contextlib.ExitStack() as copies:
            path, words = _fetch(copies, item.video, item.subtitles)
            with _named(path, item.video), _named(words, item.subtitles):
                film = read_film(
                    path,
                    size=student.model_config.img.image_size,
                    resize=student.encoder.resize,
                    title=item.title,
                    subtitles_path=words,
                    name=os.fspath(item.video),
                    finder=task.finder,
                )
                _check_length(film, budget)
            return _Opened(film=film, copies=copies.pop_all())

    def score(opened: Iterator[_Opened]) -> Generator[_Opened | VideoError, None, None]:
        under_way: collections.deque[_Opened] = collections.deque()

        def videos() -> Iterator[Video]:
            for one in opened:
                under_way.append(one)
                yield one.film.video

        with contextlib.closing(student.score_all(videos(), task.policy)) as results:
            for result in results:
                yield cut(under_way.popleft(), result)

    def cut(opened: _Opened, result: Scored | VideoError) -> _Opened | VideoError:
        if isinstance(result, VideoError):
            return result
        film = opened.film
        try:
            summary = choose(
                film,
                *result,
                exit_layers,
                budget=budget,
                policy=task.policy,
                request=task.request,
            )
        except Exception as error:
            return VideoError(error)
        return dataclasses.replace(opened, film=film.without_pictures(), summary=summary)

    def write(item: Item, scored: _Opened) -> str:
        summary = scored.summary | {"row": item.row}
        with task.corpus.folder(item) as folder, _named(scored.film.path, item.video):
            depth = student.model_config.llm.depth
            write_outputs(scored.film, summary, folder, num_layers=depth)
        layers = [segment["exit_layer"] for segment in summary["segments"]]
        return (
            f"{summary['duration_s']:.1f} s cut to {summary['selected_s']:.1f} s, exit layer "
            f"{sum(layers) / len(layers):.1f}"
        )

    return corpus.Steps(read=read, score=score, write=write)


# ---- Files in buckets ----


def _fetch(
    copies: contextlib.ExitStack, video: str | os.PathLike, words: str | os.PathLike | None
) -> tuple[str | os.PathLike, str | os.PathLike | None]:
    """A video and its subtitles, or copies that last as long as `copies` of what is in a bucket.

    Raises:
      UserError: one of them is in a bucket, and cannot be read.
    """

    def here(given: str | os.PathLike, beside: Sequence[str] = ()) -> str | os.PathLike:
        if not files.in_bucket(given):
            return given
        return copies.enter_context(files.local_copy(files.locate(given), beside))

    path = here(video, subtitles.SUFFIXES if words is None else ())
    return path, None if words is None else here(words)


@contextlib.contextmanager
def _named(path: str | os.PathLike | None, given: str | os.PathLike | None) -> Iterator[None]:
    """Mistakes are told of the address that was given, rather than of its copy."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), str(given))) from error


if __name__ == "__main__":
    sys.exit(main())
