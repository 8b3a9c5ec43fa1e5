"""Early exits that save their time: the stack runs in stages, and who is sure leaves between them.

A stage is what lies between two exits that segments may leave at, one compiled function on a fixed
batch; the first begins with the pictures. Behind a stage its survivors wait in a pool until they
make a batch, so deeper stages run full, and frames and text are embedded once. What is asked of the
device does not wait for what it said last: the host reads answers a few stages behind.

Every device keeps the segments that it began with: between stages nothing travels but, to the
hosts, three numbers per segment. They all take the same steps, since they read the same numbers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from deevisum_jax import fsdp
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.scoring import by_video, read
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import Embedded, PaliGemma2Config, Params
from deevisum_jax.sharding import BATCH_AXES, batch_sharding, on_host, place_batch
from deevisum_jax.typing import Array, Batch, ExitedScores, SegmentScores

_AHEAD = 2  # stages that the device may have before it while the host reads

# Segments that have left, in no order: their videos int[k], their places in them, their scores.
Exited = tuple[np.ndarray, np.ndarray, ExitedScores]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of a batch that stand for a segment, device by device, and what is known of them."""

    places: list[np.ndarray]  # per device int[k], rows of its part of the batch
    keys: list[np.ndarray]  # per device int[k, 2], video and segment
    said: list[np.ndarray]  # per device float32[3, k], by the exit before; see `StagedScorer.stage`

    def __len__(self) -> int:
        return sum(map(len, self.places))

    @property
    def fewest(self) -> int:
        """Of one device."""
        return min(map(len, self.places))

    @property
    def most(self) -> int:
        """Of one device."""
        return max(map(len, self.places))

    def behind(self, first: _Rows, offset: int) -> _Rows:
        """`first` and then these, whose places are moved by `offset`."""
        pairs = lambda name: zip(getattr(first, name), getattr(self, name), strict=True)
        return _Rows(
            places=[np.concatenate([a, b + offset]) for a, b in pairs("places")],
            keys=[np.concatenate(pair) for pair in pairs("keys")],
            said=[np.concatenate(pair, axis=1) for pair in pairs("said")],
        )

    def cut(self, start: int, stop: int | None = None, *, offset: int = 0) -> _Rows:
        """Some rows of every device, their places moved by `offset`."""
        part = slice(start, stop)
        return _Rows(
            places=[rows[part] + offset for rows in self.places],
            keys=[keys[part] for keys in self.keys],
            said=[said[:, part] for said in self.said],
        )

    def in_front(self) -> _Rows:
        """The same rows where `StagedScorer.pick` puts them."""
        return dataclasses.replace(self, places=[np.arange(len(rows)) for rows in self.places])


class StagedScorer:
    """Scores segments under any exit policy; what is compiled for one serves the next."""

    def __init__(
        self, config: PaliGemma2Config, param_shardings: Any, mesh: jax.sharding.Mesh
    ) -> None:
        """Compiles nothing yet.

        Args:
          config: of the model.
          param_shardings: where its parameters are.
          mesh: the current one, `jax.set_mesh(mesh)`.
        """
        self.config, self.mesh = config, mesh
        self._param_shardings = param_shardings
        self._stages: dict[tuple[int, int], Callable[..., Any]] = {}
        # A full batch of rows of two, from what a stage left of them and places int32[B]: those of
        # a device are rows of its two parts, the second's behind the first's.
        self.pick = jax.jit(
            lambda pool, batch, places: fsdp.per_device(
                _pick, in_specs=fsdp.BATCH_SPEC, out_specs=fsdp.BATCH_SPEC
            )(pool, batch, places),
            in_shardings=batch_sharding(mesh),
            compiler_options=fsdp.compiler_options(mesh),
        )

    def score_videos(
        self, params: Params, batches: Iterable[Mapping[str, np.ndarray]], policy: ExitPolicy
    ) -> dict[int, ExitedScores]:
        """Scores every valid row; by `video_id`, segments in order.

        Args:
          params: on the mesh.
          batches: host batches of one size, as `pipeline.in_order` gives them.
          policy: when a segment leaves.
        """
        return by_video(list(self.stream(params, batches, policy)))

    def stream(
        self, params: Params, batches: Iterable[Mapping[str, np.ndarray]], policy: ExitPolicy
    ) -> Iterator[Exited]:
        """As `score_videos`, as segments leave; some groups are empty.

        The next batch is asked for in between.
        """
        assert len(policy.thresholds) == len(self.config.exit_layers) - 1
        return _Stream(self, params, policy).over(batches)

    def stage(self, first: int, exit_: int) -> Callable[..., tuple[Array, Embedded | None]]:
        """The compiled stage that passes the exits `first` to `exit_`, both included.

        It takes the parameters and a `Batch` (for `first` 0) or what the stage before left, which
        it takes over. It returns float32[3, n, B], importance, summary probability and cosine at
        each of the n exits, and what the next stage takes: nothing behind the last exit.
        """
        key = (first, exit_)
        if key not in self._stages:
            in_between = first > 0 and exit_ + 1 < len(self.config.exit_layers)
            self._stages[key] = jax.jit(
                functools.partial(_run_stage, self.config, first, exit_),
                in_shardings=(self._param_shardings, batch_sharding(self.mesh)),
                donate_argnums=(1,) if in_between else (),
                compiler_options=fsdp.compiler_options(self.mesh),
            )
        return self._stages[key]


class _Stream:
    """Batches on their way through the stages."""

    def __init__(self, scorer: StagedScorer, params: Params, policy: ExitPolicy) -> None:
        self._scorer, self._params, self._policy = scorer, params, policy
        self._num_parts = math.prod(scorer.mesh.shape[axis] for axis in BATCH_AXES)
        # Exits that nobody can leave at end no stage.
        last = len(policy.thresholds)
        self._exits = [x for x in range(last) if policy.can_leave(x)] + [last]
        firsts = [0, *(x + 1 for x in self._exits[:-1])]
        self._stages = [scorer.stage(*ends) for ends in zip(firsts, self._exits, strict=True)]
        # In front of each stage: rows of one batch, fewer than a batch of every device.
        self._pools: list[tuple[_Rows, Embedded] | None] = [None] * len(self._stages)
        # Asked of the device and not read yet: stage, rows (of a new batch whose they are, of all
        # processes), numbers, what goes on.
        self._asked: collections.deque[tuple[int, Any, Array, Embedded | None]]
        self._asked = collections.deque()

    def over(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Exited]:
        for fields in batches:
            batch = place_batch(fields, self._scorer.mesh)
            self._ask(0, (batch.video_id, batch.segment, batch.valid), batch)
            while len(self._asked) > _AHEAD:
                yield self._read()
        for s in range(len(self._stages)):
            if self._pools[s] is not None:
                (rows, batch), self._pools[s] = self._pools[s], None
                self._ask(s, rows, batch)
            while self._asked:
                yield self._read()

    def _begin(self, video_id: np.ndarray, segment: np.ndarray, valid: np.ndarray) -> _Rows:
        """The rows of a new batch that are no filling."""
        parts = np.split(np.stack([video_id, segment, valid], axis=1), self._num_parts)
        places = [np.flatnonzero(part[:, 2]) for part in parts]
        return _Rows(
            places=places,
            keys=[part[rows, :2] for part, rows in zip(parts, places, strict=True)],
            said=[np.zeros((3, len(rows)), np.float32) for rows in places],
        )

    def _ask(self, s: int, rows: Any, batch: Batch | Embedded) -> None:
        self._asked.append((s, rows, *self._stages[s](self._params, batch)))

    def _read(self) -> Exited:
        """Reads what the device was asked first, and lets the survivors go on."""
        s, rows, told, batch = self._asked.popleft()
        whose = None if isinstance(rows, _Rows) else rows
        told, whose = on_host((told, whose), self._scorer.mesh)  # [3, n, B]
        exit_, rows = self._exits[s], rows if whose is None else self._begin(*whose)
        leaving, staying = [], _Rows([], [], [])
        parts = np.split(told, self._num_parts, axis=2)
        for places, keys, said, part in zip(rows.places, rows.keys, rows.said, parts, strict=True):
            now = part[:, -1, places]
            before = part[:, -2, places] if part.shape[1] > 1 else said
            sure = self._policy.is_sure(exit_, _scores(now), _scores(before) if exit_ else None)
            leaving.append((keys[sure], now[:, sure]))
            staying.places.append(places[~sure])
            staying.keys.append(keys[~sure])
            staying.said.append(now[:, ~sure])
        if len(staying):
            self._let_in(s + 1, staying, batch)
        keys = np.concatenate([keys for keys, _ in leaving])
        left = _scores(np.concatenate([now for _, now in leaving], axis=1))
        scores = ExitedScores(
            importance=left.importance,
            summary_prob=left.summary_prob,
            exit_index=np.full(len(keys), exit_),
        )
        return keys[:, 0], keys[:, 1], scores

    def _let_in(self, s: int, rows: _Rows, batch: Embedded) -> None:
        """Survivors in front of stage `s`, which runs when they make a batch."""
        per_part = batch.x.shape[0] // self._num_parts
        if self._pools[s] is None:
            if rows.fewest == per_part:  # all of them
                self._ask(s, rows, batch)
            else:
                self._pools[s] = rows, batch
            return
        waiting, pool = self._pools[s]
        assert pool.x.shape == batch.x.shape, "batches of one size"
        both = rows.behind(waiting, per_part)
        full = both.cut(0, per_part)
        picked = self._pick(pool, batch, full)
        if both.most <= per_part and both.fewest < per_part:
            self._pools[s] = full.in_front(), picked
            return
        # Those that waited have gone first: who is left came now. A device that has fewer rows than
        # another runs a part of them empty.
        left = both.cut(per_part, offset=-per_part)
        self._pools[s] = (left, batch) if len(left) else None
        self._ask(s, full.in_front(), picked)

    def _pick(self, pool: Embedded, batch: Embedded, rows: _Rows) -> Embedded:
        """A batch of rows of two, `rows` being places in both of them."""
        per_part = batch.x.shape[0] // self._num_parts
        places = np.zeros((self._num_parts, per_part), np.int32)
        for part, chosen in zip(places, rows.places, strict=True):
            part[: len(chosen)] = chosen
        places, mesh = places.reshape(-1), self._scorer.mesh
        if mesh.is_multi_process:
            places = jax.make_array_from_callback(
                places.shape, batch_sharding(mesh), lambda index: places[index]
            )
        return self._scorer.pick(pool, batch, places)


def _scores(said: np.ndarray) -> SegmentScores:
    """From float32[3, k], as `StagedScorer.stage` tells."""
    importance, summary_prob, cosine = said
    return SegmentScores(importance=importance, summary_prob=summary_prob, cosine=cosine)


def _pick(pool: Embedded, batch: Embedded, places: Array) -> Embedded:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places], pool, batch)


def _run_stage(
    config: PaliGemma2Config, first: int, exit_: int, params: Params, batch: Batch | Embedded
) -> tuple[Array, Embedded | None]:
    """As `StagedScorer.stage` says."""

    def on_device(params: Params, batch: Batch | Embedded) -> tuple[Array, Embedded | None]:
        model = paligemma2.bind(config, params)
        if isinstance(batch, Batch):
            batch = model.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        embedded, scores = model.run_exits(batch, start=first, stop=exit_ + 1)
        said = read(scores)
        told = jnp.stack([said.importance, said.summary_prob, said.cosine])
        is_last = exit_ + 1 == len(config.exit_layers)
        return told, None if is_last else embedded

    return fsdp.per_device(
        on_device,
        in_specs=(fsdp.param_specs(params), fsdp.BATCH_SPEC),
        out_specs=(P(None, None, *fsdp.BATCH_SPEC), fsdp.BATCH_SPEC),
    )(params, batch)
