"""Grain pipelines from video records to batches of segments.

A `SegmentSource` is a random-access list of all segments of all videos. Grain shuffles it by seed;
every process reads its own rows of the same global batches, however many processes there are.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from deevisum_jax.data import audio, augment
from deevisum_jax.data.prompts import LABEL_WORDS, PromptTemplate
from deevisum_jax.data.segments import SegmentEncoder, Video, segment_bounds
from deevisum_jax.data.subtitles import Cue
from deevisum_jax.errors import UserError

Record = Mapping[str, Any]
# Fields of a `Batch`, of one segment or stacked: arrays, and `teachers` with arrays by two names.
Row = dict[str, Any]


def video_from_record(record: Record) -> Video:
    """The `Video` of a stored record (its fields: docs/ARCHITECTURE.md, "A video record")."""
    waveform = np.asarray(record["audio"])
    return Video(
        title=record["title"],
        duration_s=float(record["duration_s"]),
        frames=record["frames"],
        frame_times=np.asarray(record["frame_times"]),
        cues=_cues(record["transcript"]),
        waveform=waveform.astype(np.float32) / 32768.0 if waveform.size else None,
        captions=_cues(record["captions"]),
    )


def _cues(lines: Iterable[Mapping[str, Any]]) -> list[Cue]:
    return [Cue(line["start"], line["end"], line["text"]) for line in lines]


def texts(records: Iterable[Record], template: PromptTemplate) -> Iterator[str]:
    """Every text of the records and of the prompts around it, for training a tokenizer."""
    yield template.fill(title="", transcript="", sound="")
    yield from audio.DESCRIPTION_WORDS
    yield from LABEL_WORDS
    for record in records:
        yield record["title"]
        for line in (*record["transcript"], *record["captions"]):
            yield line["text"]


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What the annotators make of every segment of one video."""

    label: np.ndarray  # int32[M], 1 = among the best `label_fraction` of the video's segments
    score: np.ndarray  # float32[M], mean annotation scaled to [0, 1] within the video


def annotation_of(
    record: Record, bounds: np.ndarray, label_fraction: float, num_annotators: int = 0
) -> Annotation:
    """Mean annotation per segment, scaled to [0, 1] as the field's `gtscore`, and its best part.

    Args:
      record: a video record with `user_scores float[U, N]`, U > 0, at `score_times float[N]`.
      bounds: `float[M, 2]` segments in seconds.
      label_fraction: share of the segments whose label is 1, at least one segment.
      num_annotators: the first so many are asked; 0 = all.

    Raises:
      UserError: the video has fewer.
    """
    scores = np.asarray(record["user_scores"], np.float64)
    if num_annotators > len(scores):
        raise UserError(
            f"data.num_annotators={num_annotators}, but video {record['video_id']} has "
            f"{len(scores)}; ask for fewer, or for all with 0"
        )
    mean = scores[: num_annotators or None].mean(axis=0)
    times = np.asarray(record["score_times"])
    centre = bounds.mean(axis=1)
    inside = (times >= bounds[:, :1]) & (times < bounds[:, 1:])
    nearest = np.abs(times[None] - centre[:, None]).argmin(axis=1)
    score = np.where(
        inside.any(axis=1), inside @ mean / np.maximum(inside.sum(axis=1), 1), mean[nearest]
    )
    label = np.zeros(len(bounds), np.int32)
    label[np.argsort(-score, kind="stable")[: max(1, round(label_fraction * len(bounds)))]] = 1
    spread = np.ptp(score)
    scaled = (score - score.min()) / spread if spread else np.full_like(score, 0.5)
    return Annotation(label, scaled.astype(np.float32))


class SegmentSource:
    """All segments of all records, in order, each as the unbatched fields of a `Batch`.

    Annotations and segment borders of every video are kept; stored pictures and prompts of the
    most recently used ones, up to `cache_mib`. Safe to read from several threads.

    Videos that nobody annotated have label and score 0: they can be scored, not trained on.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: SegmentEncoder,
        *,
        segment_s: float,
        label_fraction: float,
        num_annotators: int = 0,
        cache_mib: int = 1024,
        augmented: bool = False,
    ) -> None:
        """Reads every record once.

        Args:
          records: the videos.
          encoder: makes pictures and prompts of their segments.
          segment_s: length of a segment in seconds.
          label_fraction: as in `annotation_of`.
          num_annotators: as in `annotation_of`.
          cache_mib: memory for stored pictures and prompts.
          augmented: whether `changed` changes pictures.

        Raises:
          UserError: there are no records.
        """
        if not len(records):
            raise UserError("the data set split holds no videos; choose another split or build it")
        self._encoder, self._augmented = encoder, augmented
        self._videos = _VideoCache(records, cache_mib * 2**20)
        self.bounds: list[np.ndarray] = []
        self._annotations: list[Annotation] = []
        self.without_scores: list[str] = []  # ids of the videos that nobody annotated
        for record in records:
            bounds = segment_bounds(float(record["duration_s"]), segment_s)
            self.bounds.append(bounds)
            if len(record["user_scores"]):
                annotation = annotation_of(record, bounds, label_fraction, num_annotators)
            else:
                self.without_scores.append(record["video_id"])
                annotation = Annotation(
                    np.zeros(len(bounds), np.int32), np.zeros(len(bounds), np.float32)
                )
            self._annotations.append(annotation)
        self._first = np.cumsum([0] + [len(bounds) for bounds in self.bounds])
        self._teachers: dict[str, Sequence[Mapping[str, np.ndarray]]] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Row:
        return self._row(index, None)

    def changed(self, index: int, key: Sequence[int]) -> Row:
        """Segment `index` for training: if the source is augmented, with changed pictures.

        Args:
          index: of the segment.
          key: whole numbers of at least 0; the same ones make the same change.
        """
        change = augment.draw(np.random.default_rng(key)) if self._augmented else None
        return self._row(index, change)

    def _row(self, index: int, change: augment.Augmentation | None) -> Row:
        row = int(np.searchsorted(self._first, index, side="right")) - 1
        segment = int(index - self._first[row])
        start_s, end_s = self.bounds[row][segment]
        annotation = self._annotations[row]
        label = int(annotation.label[segment])
        cached = self._videos[row]
        # Two threads may both fill a place; they fill it with the same.
        heard = ("sound" not in self._encoder.left_out, segment)
        if heard not in cached.sound:
            cached.sound[heard] = self._encoder.sound(cached.video, start_s, end_s)
        read = (self._encoder.left_out, segment)
        if read not in cached.text:
            cached.text[read] = self._encoder.text(
                cached.video, start_s, end_s, sound=cached.sound[heard], label=label
            )
        fields: Row = _fields(
            self._encoder.frames(cached.video, start_s, end_s, change),
            cached.text[read],
            label=label,
            score=annotation.score[segment],
            video_id=row,
            segment=segment,
        )
        if self._teachers:
            fields["teachers"] = {name: said[index] for name, said in self._teachers.items()}
        return fields

    def with_teachers(
        self, said: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    ) -> SegmentSource:
        """The same segments, each with what teachers say of it; decoded videos are shared.

        A row then has one more field, `teachers`: by name, the unbatched `TeacherOutputs`.

        Args:
          said: by the teacher's name, its outputs for every segment of this source, in order.

        Raises:
          UserError: they are for more segments than there are, or for fewer.
        """
        for name, outputs in said.items():
            if len(outputs) != len(self):
                raise UserError(
                    f"the {name}'s cached outputs are for {len(outputs)} segments, and there are "
                    f"{len(self)} to train on; delete them, and cache them again with this config"
                )
        other = copy.copy(self)
        other._teachers = dict(said)
        return other

    def without(self, *inputs: str) -> SegmentSource:
        """The same segments with some of `typing.INPUTS` withheld; decoded videos are shared."""
        other = copy.copy(self)
        left_out = tuple(dict.fromkeys((*self._encoder.left_out, *inputs)))
        other._encoder = dataclasses.replace(self._encoder, left_out=left_out)
        return other


class VideoSegments(Sequence):
    """The segments of one video that nobody annotated, as the unbatched fields of a `Batch`."""

    def __init__(self, video: Video, bounds: np.ndarray, encoder: SegmentEncoder) -> None:
        self._video, self._bounds, self._encoder = video, bounds, encoder

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, segment: int) -> dict[str, np.ndarray]:
        start_s, end_s = self._bounds[segment]
        sound = self._encoder.sound(self._video, start_s, end_s)
        # The scores are read in front of the label, which is any.
        return _fields(
            self._encoder.frames(self._video, start_s, end_s),
            self._encoder.text(self._video, start_s, end_s, sound=sound, label=0),
            label=0,
            score=0.0,
            video_id=0,
            segment=segment,
        )


def _fields(
    frames: np.ndarray,
    text: Mapping[str, np.ndarray],
    *,
    label: int,
    score: float,
    video_id: int,
    segment: int,
) -> dict[str, np.ndarray]:
    """One row of a `Batch`."""
    return {
        "frames": frames,
        **text,
        "label": np.int32(label),
        "score": np.float32(score),
        "video_id": np.int32(video_id),
        "segment": np.int32(segment),
        "valid": np.True_,
    }


class _CachedVideo:
    def __init__(self, video: Video) -> None:
        self.video = video
        self.sound: dict[tuple[bool, int], str] = {}
        self.text: dict[tuple[tuple[str, ...], int], dict[str, np.ndarray]] = {}
        sound_bytes = 0 if video.waveform is None else video.waveform.nbytes
        self.num_bytes = sum(len(frame) for frame in video.frames) + sound_bytes


class _VideoCache:
    """The most recently used videos of a list of records, up to a number of bytes."""

    def __init__(self, records: Sequence[Record], max_bytes: int) -> None:
        self._records, self._max_bytes, self._bytes = records, max_bytes, 0
        self._videos: collections.OrderedDict[int, _CachedVideo] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> _CachedVideo:
        with self._lock:
            if row in self._videos:
                self._videos.move_to_end(row)
                return self._videos[row]
        cached = _CachedVideo(video_from_record(self._records[row]))
        with self._lock:
            if row not in self._videos:
                self._videos[row] = cached
                self._bytes += cached.num_bytes
            while self._bytes > self._max_bytes and len(self._videos) > 1:
                self._bytes -= self._videos.popitem(last=False)[1].num_bytes
        return cached


class TrainIterator(Iterator[Row]):
    """Endless shuffled batches, as dicts of the fields of a `Batch`.

    What is random in a row depends on the seed and the row's place in the whole order alone: not on
    threads, nor on who reads it. Where the iterator stands is a number of global batches, the same
    in every process. So what one number of processes saved, another can go on from.
    """

    def __init__(
        self,
        source: SegmentSource,
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int],
        num_threads: int,
    ) -> None:
        self._shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._source, self._seed = source, seed
        self._batch_size, self._rows, self._num_threads = batch_size, rows, num_threads
        # What the order depends on.
        self._order = {"segments": len(source), "seed": seed, "batch_size": batch_size}
        self._taken = 0
        self._batches: Iterator[Row] | None = None

    def __next__(self) -> Row:
        if self._batches is None:
            following = grain.MapDataset.range(self._taken, sys.maxsize // self._batch_size)
            self._batches = iter(
                following.map(self._read).to_iter_dataset(
                    grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=8)
                )
            )
        batch = next(self._batches)
        self._taken += 1
        return batch

    def _read(self, batch: int) -> Row:
        places = [int(batch * self._batch_size + row) for row in self._rows]
        return _stack(
            [self._source.changed(self._shuffled[place], (self._seed, place)) for place in places]
        )

    def get_state(self) -> dict[str, int]:
        """Batches taken, and what their order depends on."""
        return {"batches": self._taken, **self._order}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where another of the same data stood.

        Raises:
          UserError: it was of other data.
        """
        differing = [
            f"{name}={value}, not {state.get(name)}"
            for name, value in self._order.items()
            if state.get(name) != value
        ]
        if differing:
            raise UserError(
                "the training data is not what the checkpoint was made with: "
                f"{'; '.join(differing)}; bring the same data set back (data.data_dir), or give "
                "--workdir a new folder"
            )
        self._taken, self._batches = state["batches"], None


def train_iterator(
    source: SegmentSource,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
) -> TrainIterator:
    """Endless shuffled batches of this process's share.

    Args:
      source: the segments.
      batch_size: global batch size, over all processes.
      seed: fixes the order; every epoch has its own.
      rows: of every global batch, those of this process, which alone are read; None = all.
      num_threads: threads that decode.

    Raises:
      UserError: the batch is larger than the data, or somebody has yet to annotate a video.
    """
    if source.without_scores:
        missing = source.without_scores
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{len(missing)} of {len(source.bounds)} videos of the training split have no scores "
            f"to learn from ({', '.join(missing[:3])}{more}); give each a scores file in the "
            "manifest (docs/OWN_VIDEOS.md), or leave it out"
        )
    if batch_size > len(source):
        raise UserError(
            f"batch_size={batch_size} exceeds the {len(source)} segments of the training split; "
            "lower batch_size"
        )
    return TrainIterator(
        source,
        batch_size=batch_size,
        seed=seed,
        rows=range(batch_size) if rows is None else rows,
        num_threads=num_threads,
    )


def in_order(
    source: Sequence[Row],
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    first: int = 0,
) -> Iterator[Row]:
    """Every segment once, in order; the last batch is filled up with rows of `valid=False`.

    Args:
      source: the segments.
      batch_size: global batch size.
      rows: as in `train_iterator`; all processes see the same number of batches.
      first: the segment to begin with.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    for start in range(first, len(source), batch_size):
        indices = start + rows
        batch = _stack([source[min(int(i), len(source) - 1)] for i in indices])
        batch["valid"] &= indices < len(source)
        yield batch


def _stack(rows: Sequence[Row]) -> Row:
    return {
        name: _stack([row[name] for row in rows])
        if isinstance(value, Mapping)
        else np.stack([row[name] for row in rows])
        for name, value in rows[0].items()
    }
