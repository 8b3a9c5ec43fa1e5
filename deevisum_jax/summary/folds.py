"""Which videos train and which test: the field's published folds, files of them, partitions.

The five community folds of TVSum and SumMe are random splits drawn independently of each other:
their tests overlap, and some videos are tested in none (see `coverage`). Almost every table of the
field rests on them, so they are here, beside a partition in which every video is tested once.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from deevisum_jax.errors import UserError, closest

NUM_FOLDS = 5

_NUMBER = re.compile(r"video_([0-9]{1,9})")  # of the community's keys

# The test videos of each fold by number, from 1: TVSum in the order of ydata-tvsum50.mat, SumMe by
# name with capitals first. All others train. As published with the community's HDF5 features (Zhou
# et al., AAAI 2018) in the splits that PGL-SUM, LLMVS and most others use (tvsum_splits.json,
# summe_splits.json).
_COMMUNITY: Mapping[str, tuple[tuple[int, ...], ...]] = MappingProxyType(
    {
        "tvsum": (
            (5, 6, 8, 14, 22, 31, 34, 38, 43, 45),
            (10, 11, 13, 15, 19, 24, 33, 44, 45, 47),
            (4, 7, 9, 16, 19, 27, 31, 32, 47, 50),
            (1, 4, 11, 17, 26, 30, 37, 43, 45, 50),
            (1, 5, 6, 11, 12, 15, 16, 36, 42, 50),
        ),
        "summe": (
            (4, 9, 16, 21, 25),
            (4, 7, 15, 18, 20),
            (9, 10, 13, 19, 23),
            (1, 13, 14, 18, 25),
            (11, 15, 22, 24, 25),
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Fold:
    """Video ids; none is in both."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def make(kind: str, dataset: str, video_ids: Sequence[str], *, seed: int = 0) -> tuple[Fold, ...]:
    """The folds that a config names.

    Args:
      kind: "community", "partition", or the path of a JSON file of folds.
      dataset: the data set's name without its config, such as "tvsum".
      video_ids: all its videos, in its official order.
      seed: of the partition.

    Raises:
      UserError: as `community`, `partition` and `load`.
    """
    if kind == "community":
        return community(dataset, video_ids)
    if kind == "partition":
        return partition(video_ids, seed, max(2, min(NUM_FOLDS, len(video_ids))))
    return load(kind, video_ids)


def community(dataset: str, video_ids: Sequence[str]) -> tuple[Fold, ...]:
    """The five published folds of TVSum ("tvsum") or SumMe ("summe").

    Args:
      dataset: which of the two.
      video_ids: all its videos in its official order: `video_i` is `video_ids[i - 1]`.

    Raises:
      UserError: another data set, or another number of videos than it has.
    """
    if dataset not in _COMMUNITY:
        raise UserError(
            f"there are no community folds of {dataset!r}, only of {', '.join(_COMMUNITY)}; take "
            'data.folds="partition", or give a JSON file of folds'
        )
    tests, ids = _COMMUNITY[dataset], tuple(video_ids)
    wanted = {"tvsum": 50, "summe": 25}[dataset]
    if len(ids) != wanted:
        raise UserError(
            f"the community folds number the {wanted} videos of {dataset}, and there are "
            f'{len(ids)}; take data.folds="partition", or get the missing ones'
        )
    return tuple(_rest_trains(ids, [ids[number - 1] for number in test]) for test in tests)


def partition(video_ids: Sequence[str], seed: int, num_folds: int = NUM_FOLDS) -> tuple[Fold, ...]:
    """Folds in which every video is tested exactly once, in parts of equal size or one more.

    Args:
      video_ids: all videos; their order matters as the seed does.
      seed: of the shuffle (numpy's PCG64, the same on every machine).
      num_folds: how many.

    Raises:
      UserError: there are fewer videos than folds, or fewer than two folds.
    """
    ids = tuple(video_ids)
    if not 2 <= num_folds <= len(ids):
        raise UserError(
            f"there are {len(ids)} videos, and {num_folds} folds that each test one were asked "
            "for; get more videos, or set data.folds=''"
        )
    order = np.random.default_rng(seed).permutation(len(ids))
    return tuple(
        _rest_trains(ids, [ids[k] for k in sorted(part)])
        for part in np.array_split(order, num_folds)
    )


def load(path: str, video_ids: Sequence[str]) -> tuple[Fold, ...]:
    """The folds of a JSON file: `[{"train_keys": [...], "test_keys": [...]}, ...]`.

    Keys are video ids, or the community's `video_i` for `video_ids[i - 1]`.

    Raises:
      UserError: it cannot be read or has another form; an unknown video; one that is named twice
        or both trains and tests; a fold that trains or tests on nothing.
    """
    try:
        content = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"folds {path!r} cannot be read as JSON ({error}); data.folds is "
            '"", "community", "partition" or such a file'
        ) from None
    if (
        not isinstance(content, list)
        or not content
        or not all(_has_form(entry) for entry in content)
    ):
        raise UserError(
            f'{path} holds no folds; write a list of {{"train_keys": [...], "test_keys": [...]}} '
            "with lists of video ids"
        )
    found = []
    for index, entry in enumerate(content):
        train = _resolve(entry["train_keys"], video_ids, f"{path}, fold {index}, train_keys")
        test = _resolve(entry["test_keys"], video_ids, f"{path}, fold {index}, test_keys")
        if both := sorted(set(train) & set(test)):
            raise UserError(
                f"{path}, fold {index}: {', '.join(both)} both train and test; take them out of "
                "one of the two"
            )
        found.append(Fold(train, test))
    return tuple(found)


def choose(folds: Sequence[Fold], fold: int) -> Fold:
    """Fold number `fold`, from 0.

    Raises:
      UserError: there is none of this number.
    """
    if not 0 <= fold < len(folds):
        raise UserError(
            f"data.fold={fold} is out of range: there are {len(folds)} folds, 0 to {len(folds) - 1}"
        )
    return folds[fold]


def validation(train: Sequence[str], seed: int, count: int) -> tuple[str, ...]:
    """`count` of the training videos, drawn by `seed`, in their order in `train`.

    Other training videos, as of another fold, are another draw.

    Raises:
      UserError: none would be left to train on, or none is asked for.
    """
    if not 1 <= count < len(train):
        raise UserError(
            f"{count} of {len(train)} training videos cannot be kept for validation; at least one "
            "must train and one validate"
        )
    whose = hashlib.sha256("\n".join(train).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(whose[:8], "big")])
    chosen = rng.choice(len(train), count, replace=False)
    return tuple(train[k] for k in sorted(chosen))


def coverage(folds: Sequence[Fold]) -> tuple[int, int, int]:
    """How many videos are ever tested, how many there are, and how many are tested repeatedly."""
    times = collections.Counter(video for fold in folds for video in fold.test)
    everyone = {video for fold in folds for video in (*fold.train, *fold.test)}
    return len(times), len(everyone), sum(count > 1 for count in times.values())


def coverage_sentence(folds: Sequence[Fold]) -> str:
    """What `coverage` means, for people."""
    tested, total, overlapping = coverage(folds)
    if not overlapping:
        times = "once" if tested == total else "at most once"
        many = "1 fold" if len(folds) == 1 else f"{len(folds)} folds"
        return f"{many}: {tested} of {total} videos are tested, each {times}."
    return (
        f"{len(folds)} folds that overlap: {tested} of {total} videos are ever tested, "
        f"{overlapping} of them in more than one fold; the mean over folds counts these repeatedly."
    )


def resolve(key: str, video_ids: Sequence[str], *, numbered: bool = True) -> str | None:
    """The video that a key names, by its id or as the community's `video_i`; None if none.

    Args:
      key: what a file calls a video.
      video_ids: those that there are.
      numbered: they are in an order that all know, so that numbers mean something. Numbers mean
        nothing either where ids themselves look like them.
    """
    if key in video_ids:
        return key
    number = _NUMBER.fullmatch(key)
    if number and 1 <= int(number[1]) <= len(video_ids) and _go_by_number(video_ids, numbered):
        return video_ids[int(number[1]) - 1]
    return None


def unknown(key: str, video_ids: Sequence[str], *, numbered: bool = True) -> str:
    """Why `resolve` finds nothing, as the end of a sentence about `key`."""
    numbers = ""
    if _go_by_number(video_ids, numbered):
        numbers = f" (nor is it video_1 to video_{len(video_ids)})"
    return f"no video of the data set's {len(video_ids)}{numbers}; {closest(key, video_ids)}"


def _go_by_number(video_ids: Sequence[str], numbered: bool) -> bool:
    return numbered and not any(_NUMBER.fullmatch(video) for video in video_ids)


def _has_form(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), list)
        and entry[name]
        and all(isinstance(key, str) for key in entry[name])
        for name in ("train_keys", "test_keys")
    )


def _resolve(keys: Sequence[str], video_ids: Sequence[str], where: str) -> tuple[str, ...]:
    found = []
    for key in keys:
        video_id = resolve(key, video_ids)
        if video_id is None:
            raise UserError(f"{where}: {key!r} is {unknown(key, video_ids)}")
        if video_id in found:
            raise UserError(f"{where}: {video_id} is named twice; name it once")
        found.append(video_id)
    return tuple(found)


def _rest_trains(video_ids: Sequence[str], test: Sequence[str]) -> Fold:
    tested = set(test)
    return Fold(tuple(video for video in video_ids if video not in tested), tuple(test))
