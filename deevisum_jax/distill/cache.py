r"""What a teacher says of every segment, computed once and kept: the teacher never runs beside us.

    <run of the teacher>/outputs/
      cache.json                         of whom and of what; "complete" when all files are there
      00000-of-00012.array_record        one record per segment of the training split, in the order
      00001-of-00012.array_record ...    of `pipeline.SegmentSource`; as many in all but the last

A record is the bytes of the fields of `typing.TeacherOutputs` that are there, without their first
dimension, one after the other in the order of "fields" in cache.json, which tells their dtypes
(float32 or int32, little-endian) and shapes. Nothing is rounded or compressed. For a class head and
an importance score alone:

    class_logits float32[2], importance float32[]        12 bytes

A file appears when it is whole, so what a killed run leaves is some files less: the same command
writes those. In a bucket files are made here and uploaded. ArrayRecord reads local files only, so
every host copies the cache of a bucket to its user's:

    ~/.cache/deevisum_jax/<address>/<content>/00000-of-00012.array_record     both are digests
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from flax.traverse_util import flatten_dict

from deevisum_jax import distributed, files
from deevisum_jax.config import DataConfig
from deevisum_jax.data.pipeline import Row
from deevisum_jax.data.prompts import PromptTemplate
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.sharding import on_host, place_batch
from deevisum_jax.typing import Batch, TeacherOutputs

FOLDER = "outputs"  # of a run
META_FILE = "cache.json"
EXAMPLES_PER_FILE = 512  # what a killed run loses at most

_FORMAT = 1
_SUFFIX = ".array_record"
# One record per chunk, for reading here and there; logits do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_STORED = {"float32": "<f4", "int32": "<i4"}
# What of DataConfig changes a row, besides `resize`, which follows the teacher's weights. Its data
# set, split and folds are in `datasets.Dataset.identity`.
ROW_FIELDS = (
    "segment_s", "label_fraction", "num_annotators", "num_frames", "text_len", "caption_len",
    "transcript_context_s", "left_out",
)  # fmt: skip
# Those of them that only the suffix shows: where no tokens are asked for, they make no difference.
SUFFIX_FIELDS = ("label_fraction", "num_annotators", "caption_len")
_SHOWN_S = 10.0  # between two lines on how far it is
_MAX_SHOWN = 60  # letters of a value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What teacher outputs depend on; JSON through and through."""

    weights: str  # `Checkpoints.fingerprint` of the teacher
    data: Mapping[str, Any]  # the training split's videos, and how rows are made of them
    prompt: Mapping[str, str]  # digests of the template and of the tokenizer's pieces
    image_size: int  # pixels
    asked: Mapping[str, Any]  # which positions, how many tokens, the temperature, taught layers

    @classmethod
    def of(
        cls,
        *,
        weights: str,
        dataset: Mapping[str, Any],
        data: DataConfig,
        template: PromptTemplate,
        tokens: Tokenizer,
        image_size: int,
        asked: Mapping[str, Any],
    ) -> Identity:
        """The identity of the outputs for the training split.

        Args:
          weights: `Checkpoints.fingerprint` of the teacher.
          dataset: `datasets.Dataset.identity`.
          data: with `resize` settled.
          template: of the prompts.
          tokens: their tokenizer.
          image_size: pixels, of the pictures that the teacher is shown.
          asked: of the teacher, as JSON.
        """
        assert data.resize is not None, "the config of a run is settled"
        values = dataclasses.asdict(data)
        made = cls(
            weights=weights,
            data={
                "data_set": dataset["data_set"],
                "train": dataset["splits"]["train"],
                **{
                    name: values[name]
                    for name in (*ROW_FIELDS, "resize")
                    if asked["top_k"] or name not in SUFFIX_FIELDS
                },
            },
            prompt={
                "template": _digest(template.text),
                "tokenizer": _digest(json.dumps(tokens.pieces)),
            },
            image_size=image_size,
            asked=asked,
        )
        return cls(**json.loads(json.dumps(dataclasses.asdict(made))))  # tuples are lists

    def differences(self, other: Identity) -> list[str]:
        """Parts in which the other differs, as `data.num_frames: 1 -> 2`."""
        old, new = (flatten_dict(dataclasses.asdict(one), sep=".") for one in (self, other))
        return [
            f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
            for name in dict.fromkeys((*old, *new))
            if old.get(name) != new.get(name)
        ]


def _shown(value: Any) -> str:
    """For people; of what is long, its digest tells that it is another."""
    text = json.dumps(value)
    if len(text) <= _MAX_SHOWN:
        return text
    if isinstance(value, str):
        return f"{value[:12]}..."
    return f"{len(value)} items (sha256 {_digest(text)[:12]}...)"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Meta:
    """What `cache.json` holds."""

    identity: Identity
    num_examples: int
    examples_per_file: int
    complete: bool = False
    fields: Mapping[str, Mapping[str, Any]] | None = None  # by name: dtype, shape; of one example
    num_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by file, when complete

    @property
    def names(self) -> list[str]:
        count = math.ceil(self.num_examples / self.examples_per_file)
        return [f"{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(count)]

    def size(self, number: int) -> int:
        """Examples in a file."""
        return min(self.examples_per_file, self.num_examples - number * self.examples_per_file)

    @property
    def record_bytes(self) -> int:
        return sum(4 * math.prod(field["shape"]) for field in self.fields.values())

    def done(self, sizes: Mapping[str, int]) -> list[int]:
        """Numbers of the files that are there, of those with these sizes in bytes."""
        return [
            number
            for number, name in enumerate(self.names)
            if name in sizes and sizes[name] == self.num_bytes.get(name, sizes[name])
        ]

    def write(self, folder: epath.Path) -> None:
        content = {"format": _FORMAT} | dataclasses.asdict(self)
        files.write_whole(folder / META_FILE, json.dumps(content, indent=2) + "\n")


def _read_meta(folder: epath.Path) -> _Meta:
    path = folder / META_FILE
    content = files.read_json(path, f"delete {folder}, and cache the outputs again")
    try:
        if content.pop("format") != _FORMAT:
            raise KeyError("format")
        identity = Identity(**content.pop("identity"))
        return _Meta(identity=identity, **content)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what this version of deevisum_jax writes ({error}); delete {folder}, "
            "and cache the outputs again"
        ) from None


def _sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file of records, by name."""
    if files.in_bucket(folder):
        sizes = {name: size for name, (size, _) in files.contents(folder).items()}
    else:
        sizes = {path.name: path.stat().st_size for path in pathlib.Path(folder).iterdir()}
    return {name: size for name, size in sizes.items() if name.endswith(_SUFFIX)}


def command(stage: str) -> str:
    """The command that writes the outputs of a stage."""
    return (
        f"python -m deevisum_jax.main --config CONFIG --config.stage={stage} --mode cache_teacher "
        "--workdir WORKDIR"
    )


# ---- To write ----


def write(
    folder: epath.Path,
    identity: Identity,
    score: Callable[[Batch], TeacherOutputs],
    batches: Callable[[int], Iterable[Row]],
    mesh: jax.sharding.Mesh,
    *,
    num_examples: int,
    describe: Callable[[int, int], Mapping[str, Any]],
    examples_per_file: int = EXAMPLES_PER_FILE,
) -> None:
    """Writes the files that are missing, of a cache that was begun or not; every process calls it.

    Whatever `batches` raises, such as `PreemptedError`, ends it; whole files stay.

    Args:
      folder: of the cache.
      identity: of the outputs.
      score: the teacher's outputs, with its parameters bound.
      batches: host batches from an example on, as `pipeline.in_order` gives them.
      mesh: where they are scored.
      num_examples: segments in all.
      describe: what a segment (`Batch.video_id`, `Batch.segment`) is, for people.
      examples_per_file: of a cache that was not begun.

    Raises:
      UserError: the folder holds outputs of another identity; an output is not finite; the disk or
        bucket does not take a file.
    """
    wanted = _Meta(
        identity=identity, num_examples=num_examples, examples_per_file=examples_per_file
    )
    begun = distributed.on_main(lambda: _begin(folder, wanted))
    meta = dataclasses.replace(wanted, examples_per_file=begun["examples_per_file"])
    rows: Iterator[dict[str, np.ndarray]] = iter(())
    reached, told_s = -1, time.monotonic()
    for number in begun["missing"]:
        first = number * meta.examples_per_file
        if first != reached:
            rows = said(score, batches(first), mesh, describe)
        records = list(itertools.islice(rows, meta.size(number)))
        reached = first + len(records)
        assert len(records) == meta.size(number), f"the batches end at example {reached}"
        distributed.on_main(functools.partial(_write_file, folder, number, records))
        if distributed.is_main() and time.monotonic() > told_s + _SHOWN_S:
            told_s = time.monotonic()
            print(f"outputs for {reached} of {num_examples} segments are written", file=sys.stderr)
    distributed.on_main(lambda: _finish(folder))


def is_whole(folder: epath.Path, identity: Identity) -> bool:
    """Whether all outputs of this identity are written; asked by one process for all."""

    def look() -> bool:
        if not files.exists(folder / META_FILE):
            return False
        meta = _read_meta(folder)
        there = meta.complete and len(meta.done(_sizes(folder))) == len(meta.names)
        return there and not meta.identity.differences(identity)

    return distributed.on_main(look)


def _begin(folder: epath.Path, wanted: _Meta) -> dict[str, Any]:
    """Which files are missing, and how many examples are in each."""
    meta = wanted
    if files.exists(folder / META_FILE):
        meta = _read_meta(folder)
        differing = meta.identity.differences(wanted.identity)
        if meta.num_examples != wanted.num_examples:
            differing.append(f"segments: {meta.num_examples} -> {wanted.num_examples}")
        if differing:
            raise UserError(
                f"{folder} holds other outputs than are to be written now (there -> now): "
                f"{'; '.join(differing)}; delete {folder} to write them anew, or bring back what "
                "differs"
            )
    else:
        if not files.in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not files.is_empty(folder):
            raise UserError(
                f"{folder} holds files, and no {META_FILE} that tells what of; delete {folder}, or "
                "bring that file back"
            )
        meta.write(folder)
    if not files.in_bucket(folder):
        files.clear_unfinished(folder, META_FILE, {META_FILE, *meta.names})
    done = meta.done(_sizes(folder))
    missing = [number for number in range(len(meta.names)) if number not in done]
    if meta.complete and missing:
        # Their sizes stay known, so that what is too short is still seen if this ends early.
        dataclasses.replace(meta, complete=False).write(folder)
    return {"missing": missing, "examples_per_file": meta.examples_per_file}


def said(
    score: Callable[[Batch], TeacherOutputs],
    batches: Iterable[Row],
    mesh: jax.sharding.Mesh,
    describe: Callable[[int, int], Mapping[str, Any]],
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs of every valid row, unbatched; the same in every process, which all call it.

    Args:
      score: as of `write`.
      batches: host batches.
      mesh: where they are scored.
      describe: as of `write`.

    Raises:
      UserError: an output is not finite; names it and the segment.
    """
    for fields in batches:
        batch = place_batch(fields, mesh)
        found = (score(batch), batch.video_id, batch.segment, batch.valid)
        outputs, video_id, segment, valid = on_host(found, mesh)
        arrays = {
            field.name: np.asarray(rows)
            for field in dataclasses.fields(outputs)
            if (rows := getattr(outputs, field.name)) is not None
        }
        for b in np.flatnonzero(valid):
            for name, rows in arrays.items():
                if not np.isfinite(rows[b]).all():
                    which = describe(int(video_id[b]), int(segment[b]))
                    distributed.everywhere(functools.partial(_refuse, name, which))
            yield {name: rows[b] for name, rows in arrays.items()}


def _refuse(name: str, which: Mapping[str, Any]) -> NoReturn:
    told = ", ".join(f"{key} {value}" for key, value in which.items())
    raise UserError(
        f"the teacher's {name} is not finite for {told}; look at that video, or train the teacher "
        "again with a lower optim.learning_rate; nothing is learned from such numbers"
    )


def _write_file(folder: epath.Path, number: int, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
    meta = _read_meta(folder)
    fields = {
        name: {"dtype": str(value.dtype), "shape": list(value.shape)}
        for name, value in rows[0].items()
    }
    if meta.fields is None:
        meta = dataclasses.replace(meta, fields=fields)
        if not files.in_bucket(folder):
            files.check_room(
                folder, meta.num_examples * meta.record_bytes, "put the teacher's run on"
            )
        meta.write(folder)
    assert meta.fields == fields, f"of one identity and {fields=}, {meta.fields=}"
    path = folder / meta.names[number]
    with files.replacing(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for row in rows:
                writer.write(_encode(row))
            writer.close()
        except RuntimeError as error:  # the library's only one
            raise UserError(
                f"{path} cannot be written ({error}); make room, and give the same command again"
            ) from error


def _encode(row: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(value.astype(_STORED[str(value.dtype)]).tobytes() for value in row.values())


def _finish(folder: epath.Path) -> None:
    meta = _read_meta(folder)
    if not meta.complete:
        dataclasses.replace(meta, complete=True, num_bytes=_sizes(folder)).write(folder)


# ---- To read ----


class Cache(Sequence):
    """The outputs of one teacher for the segments of the training split, in order.

    An item is a dict of the unbatched fields of `TeacherOutputs` that the teacher was asked for.
    Safe to read from several threads.
    """

    def __init__(
        self, folder: epath.Path, stage: str, meta: _Meta, opened: Sequence[Sequence[bytes]]
    ) -> None:
        """For `open`."""
        self._folder, self._stage, self._meta, self._files = folder, stage, meta, opened
        self._names, self._record_bytes = meta.names, meta.record_bytes
        self._layout = {
            name: (_STORED[field["dtype"]], tuple(field["shape"]), math.prod(field["shape"]))
            for name, field in meta.fields.items()
        }

    @classmethod
    def open(cls, folder: epath.Path, stage: str) -> Cache:
        """Opens what `write` has finished; every process calls it.

        Args:
          folder: of the cache.
          stage: the teacher's name.

        Raises:
          UserError: there is no cache, it is not complete, or a file of it is missing or damaged;
            the disk has no room for the copy of what is in a bucket.
        """
        return distributed.in_turns(functools.partial(_open, folder, stage))

    def check(self, wanted: Identity) -> None:
        """Makes sure that these are the outputs of this teacher for this data.

        Raises:
          UserError: they are not; every part that differs is told.
        """
        if differing := self._meta.identity.differences(wanted):
            raise UserError(
                f"{self._folder} holds the outputs of another {self._stage}, or for other data "
                f"(cached -> this run): {'; '.join(differing)}; bring back what differs, or delete "
                f"{self._folder} and give: {command(self._stage)}"
            )

    def __len__(self) -> int:
        return self._meta.num_examples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, got index {index}")
        number, position = divmod(index, self._meta.examples_per_file)
        path = self._folder / self._names[number]
        with _finding_damage(path, self._stage):
            record = self._files[number][position]
        if len(record) != self._record_bytes:
            raise _damaged(
                path, f"a record has {len(record)} bytes, not {self._record_bytes}", self._stage
            )
        row, start = {}, 0
        for field, (dtype, shape, count) in self._layout.items():
            row[field] = np.frombuffer(record, dtype, count, start).reshape(shape)
            start += 4 * count
        return row


def _open(folder: epath.Path, stage: str) -> Cache:
    if not files.exists(folder / META_FILE):
        raise UserError(
            f"{folder} holds no outputs of the {stage}; cache them first: {command(stage)}"
        )
    meta = _read_meta(folder)
    sizes = _sizes(folder)
    if not meta.complete:
        there = sum(map(meta.size, meta.done(sizes)))
        raise UserError(
            f"{folder} holds the {stage}'s outputs for {there} of {meta.num_examples} segments; "
            f"the same command goes on: {command(stage)}"
        )
    for name in meta.names:
        if name not in sizes:
            raise _damaged(folder / name, "it is missing", stage)
        if sizes[name] != meta.num_bytes[name]:
            raise _damaged(folder / name, f"{sizes[name]} bytes, not {meta.num_bytes[name]}", stage)
    local = _local_copy(folder, meta) if files.in_bucket(folder) else folder
    opened = []
    for number, name in enumerate(meta.names):
        with _finding_damage(folder / name, stage):
            opened.append(grain.sources.ArrayRecordDataSource(os.fspath(local / name)))
        if len(opened[-1]) != meta.size(number):
            why = f"{len(opened[-1])} records, not {meta.size(number)}"
            raise _damaged(folder / name, why, stage)
    return Cache(folder, stage, meta, opened)


@contextlib.contextmanager
def _finding_damage(path: epath.Path, stage: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the library's only one
        raise _damaged(path, str(error).partition(";")[0], stage) from error


def _damaged(path: epath.Path, why: str, stage: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why}); delete it if it is there, and this writes it again: "
        f"{command(stage)}"
    )


def _local_copy(folder: epath.Path, meta: _Meta) -> pathlib.Path:
    """Where the files of a bucket are on this host, copied unless they are there."""
    there = files.contents(folder)
    found = {name: there[name] for name in meta.names}
    # Named by its content: what is there stays as it is while a run reads it.
    here = files.user_copy(folder) / files.digest(json.dumps(found, sort_keys=True))
    try:
        files.fetch(folder, {name: size for name, (size, _) in found.items()}, here)
    except OSError as error:
        raise UserError(
            f"{here}, the copy of {folder}, cannot be written ({error}); set XDG_CACHE_HOME to a "
            "folder that can"
        ) from error
    return here
