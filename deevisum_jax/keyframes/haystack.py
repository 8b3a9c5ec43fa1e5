"""Needles in a haystack: does a choice of K frames hold the moment that a query asks for?

As VideoNIAH has it (ViLaMP, Cheng et al., ICML 2025, section 4), with pictures for queries, so that
no language model has a part in it: a needle is a clip of a few seconds, hidden at a random place of
a haystack of frames of *other* videos. One frame of the clip, drawn at random, is taken out and
asks for the others. The needle is found if at least one of its frames is among the K keyframes.

All of it is on embeddings, whoever made them. `draw_scenes` makes some where no videos are at hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes.baselines import unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaystackConfig:
    """What is hidden in what.

    Raises:
      UserError: a number is out of range; lengths of needles that the rate of frames cannot give.
    """

    num_frames: int = 10_000  # N, of the haystack with its needles
    frame_rate: float = 2.0  # frames per second of all videos
    needle_s: tuple[float, float] = (2.0, 10.0)  # shortest and longest clip, seconds
    # Clips of different videos in one haystack. The query is the mean of their unit queries.
    num_needles: int = 1

    def __post_init__(self):
        if self.num_frames < 1:
            raise UserError(f"a haystack has at least 1 frame, got num_frames {self.num_frames}")
        if self.num_needles < 1:
            raise UserError(f"num_needles must be at least 1, got {self.num_needles}")
        if not (math.isfinite(self.frame_rate) and self.frame_rate > 0):
            raise UserError(
                f"frame_rate must be a positive number of frames per second, got {self.frame_rate}"
            )
        shortest_s, longest_s = self.needle_s
        if not (0 < shortest_s <= longest_s < math.inf):
            raise UserError(
                f"needle_s must be a shortest and a longest length in seconds, got {self.needle_s}"
            )
        least, most = self.clip_frames
        if least < 2:
            raise UserError(
                f"a needle of {shortest_s:g} s has less than 2 frames at {self.frame_rate:g} "
                "frames per second, one to ask with and one to find; give longer needles"
            )
        if most < least:
            raise UserError(
                f"no whole number of frames lasts {shortest_s:g} to {longest_s:g} s at "
                f"{self.frame_rate:g} frames per second; widen needle_s"
            )

    @property
    def clip_frames(self) -> tuple[int, int]:
        """Frames of the shortest and the longest clip, the one that asks included."""
        # The nudge keeps 0.1 s * 30 at 3 frames although the product is 3.0000000000000004.
        shortest, longest = (seconds * self.frame_rate for seconds in self.needle_s)
        return math.ceil(shortest - 1e-6), math.floor(longest + 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Haystack:
    """Frames with needles among them, and what asks for them."""

    embeddings: np.ndarray  # float[N, D]
    query: np.ndarray  # float32[D]
    needle: np.ndarray  # int64[N], which needle a frame is of, -1 = hay
    video: np.ndarray  # int64[N], which video a frame is of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a method found in the haystacks of one seed; means over these."""

    recall: float  # share of needles of which a frame was chosen
    num_videos: float  # different videos that the chosen frames are of
    redundancy: float  # mean cosine of two chosen frames; NaN where one alone is chosen


# (embeddings float[N, D], query float32[D], random numbers) -> int[at most K], frames.
Method = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def check(videos: Sequence[np.ndarray], config: HaystackConfig) -> None:
    """Whether such haystacks can be drawn from these videos, whichever the needles are of.

    Args:
      videos: float[T, D] of each video, embeddings of its frames.
      config: the haystacks.

    Raises:
      UserError: there are too few videos, or too few frames in those that are left for hay; a
        video is shorter than the longest needle; embeddings of different widths, or such that are
        not finite.
    """
    needed = config.num_needles + 1
    if len(videos) < needed:
        raise UserError(
            f"{config.num_needles} needle{'s' * (config.num_needles > 1)} in frames of other "
            f"videos want at least {needed} videos, got {len(videos)}; give more"
        )
    for v, frames in enumerate(videos):
        if frames.ndim != 2 or frames.shape[1] != videos[0].shape[-1]:
            raise UserError(
                f"video {v} has embeddings of shape {list(frames.shape)}, wanted "
                f"[frames, {videos[0].shape[-1]}] as of the first; embed all with one model"
            )
        if not np.isfinite(frames).all():
            bad = int(np.argmin(np.isfinite(frames).all(1)))
            raise UserError(
                f"video {v}: the embedding of frame {bad} is not finite; leave the video out"
            )
    lengths = [len(frames) for frames in videos]
    least, most = config.clip_frames
    if min(lengths) < most:
        v = int(np.argmin(lengths))
        raise UserError(
            f"a needle of {config.needle_s[1]:g} s has {most} frames, but video {v} only "
            f"{lengths[v]}; give shorter needles, or leave the video out"
        )
    # The longest videos may be those of the needles, and these the shortest.
    hay = sum(sorted(lengths)[: -config.num_needles])
    possible = hay + config.num_needles * (least - 1)
    if possible < config.num_frames:
        raise UserError(
            f"a haystack of {config.num_frames:,} frames of other videos is wanted, but the "
            f"{len(videos)} videos surely give {possible:,} only; ask for fewer frames, or give "
            "more videos"
        )


def draw(
    videos: Sequence[np.ndarray], config: HaystackConfig, rng: np.random.Generator
) -> Haystack:
    """Hides needles.

    Clips are drawn alike from all videos, lengths and places. Hay is whole videos in random order,
    the last one cut off, without those that a needle is of. Each needle lies in one piece anywhere
    in it.

    Args:
      videos: float[T, D] of each video, embeddings of its frames.
      config: the haystacks; `check` has passed.
      rng: draws.
    """
    order = rng.permutation(len(videos))
    sources, others = order[: config.num_needles], order[config.num_needles :]
    least, most = config.clip_frames
    clips, queries = [], []
    for v in sources:
        length = int(rng.integers(least, most + 1))
        start = int(rng.integers(len(videos[v]) - length + 1))
        clip = videos[v][start : start + length]
        asking = int(rng.integers(length))
        queries.append(unit(clip[asking]))
        clips.append(np.delete(clip, asking, axis=0))
    num_hay = config.num_frames - sum(map(len, clips))
    if num_hay < 0:
        raise UserError(
            f"{config.num_needles} needles have more than {config.num_frames:,} frames together; "
            "ask for a longer haystack, or fewer needles"
        )
    places = np.sort(rng.integers(num_hay + 1, size=len(clips)))  # in front of that frame of hay
    owner = np.repeat(others, [len(videos[v]) for v in others])[:num_hay]
    hay = np.concatenate([videos[v] for v in others])[:num_hay]

    parts, needle, video = [], [], []
    edges = [0, *places.tolist(), num_hay]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        parts.append(hay[start:end])
        needle.append(np.full(end - start, -1))
        video.append(owner[start:end])
        if i < len(clips):
            parts.append(clips[i])
            needle.append(np.full(len(clips[i]), i))
            video.append(np.full(len(clips[i]), sources[i]))
    return Haystack(
        embeddings=np.concatenate(parts),
        query=np.mean(queries, axis=0, dtype=np.float32),
        needle=np.concatenate(needle),
        video=np.concatenate(video),
    )


def search(
    videos: Sequence[np.ndarray],
    methods: Mapping[str, Method],
    config: HaystackConfig,
    *,
    num_haystacks: int,
    seed: int,
) -> dict[str, Found]:
    """What each method finds in the same haystacks.

    Args:
      videos: float[T, D] of each video, embeddings of its frames.
      methods: by name.
      config: the haystacks.
      num_haystacks: how many are drawn.
      seed: of haystacks, and of methods that draw.

    Returns:
      By the methods' names.

    Raises:
      UserError: as `check`; `num_haystacks` is less than 1; or needles do not fit a haystack.
    """
    check(videos, config)
    if num_haystacks < 1:
        raise UserError(f"num_haystacks must be at least 1, got {num_haystacks}")
    rng = np.random.default_rng(seed)
    of_methods = dict(zip(methods, rng.spawn(len(methods)), strict=True))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    for _ in range(num_haystacks):
        haystack = draw(videos, config, rng)
        for name, method in methods.items():
            chosen = np.asarray(method(haystack.embeddings, haystack.query, of_methods[name]))
            found[name].append(_judge(haystack, chosen, config.num_needles))
    means = {name: np.mean(rows, axis=0).tolist() for name, rows in found.items()}
    return {
        name: Found(recall=recall, num_videos=num_videos, redundancy=redundancy)
        for name, (recall, num_videos, redundancy) in means.items()
    }


def _judge(haystack: Haystack, chosen: np.ndarray, num_needles: int) -> tuple[float, float, float]:
    """Recall, number of videos, and mean cosine of pairs of one choice."""
    needles = np.unique(haystack.needle[chosen])
    recall = (needles >= 0).sum() / num_needles
    return recall, len(np.unique(haystack.video[chosen])), _redundancy(haystack.embeddings[chosen])


def _redundancy(embeddings: np.ndarray) -> float:
    """Mean cosine of two different rows, float[K, D]; NaN of a single one."""
    K = len(embeddings)
    if K < 2:
        return math.nan
    frames = unit(embeddings.astype(np.float64))
    cosines = frames @ frames.T
    return float((cosines.sum() - np.trace(cosines)) / (K * (K - 1)))


def centred(videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same embeddings less their common mean, float[T, D] each.

    Embeddings of all pictures share a direction, and cosines count it; of a model that has learned
    nothing, little else is there to see.

    Args:
      videos: float[T, D] of each video.
    """
    frames = [unit(video) for video in videos]
    mean = np.concatenate(frames).mean(0, dtype=np.float64).astype(np.float32)
    return [video - mean for video in frames]


def cosine_quantiles(
    videos: Sequence[np.ndarray], rng: np.random.Generator, num_pairs: int = 20_000
) -> dict[str, np.ndarray]:
    """What cosines there are, to judge a threshold by.

    Args:
      videos: float[T, D] of each video; at least two, of at least two frames.
      rng: draws the pairs.
      num_pairs: of each kind.

    Returns:
      float64[3], the 5 %, 50 % and 95 % quantile of the cosines of `neighbours` (frames that
      follow each other), of frames of the `same video`, and of `other videos`.
    """
    frames = np.concatenate([unit(video) for video in videos])
    lengths = np.array([len(video) for video in videos])
    starts = np.cumsum(lengths) - lengths

    def somewhere(v: np.ndarray) -> np.ndarray:
        return starts[v] + rng.integers(lengths[v])

    a = rng.choice(len(videos), num_pairs)
    b = (a + rng.integers(1, len(videos), num_pairs)) % len(videos)
    first = starts[a] + rng.integers(lengths[a] - 1)
    pairs = {
        "neighbours": (first, first + 1),
        "same video": (somewhere(a), somewhere(a)),
        "other videos": (somewhere(a), somewhere(b)),
    }
    return {
        name: np.quantile(np.einsum("ND,ND->N", frames[i], frames[j]), (0.05, 0.5, 0.95))
        for name, (i, j) in pairs.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """Videos that are made up: what an embedding consists of, as shares of its squared length.

    A frame is the sum of one direction that all pictures share, one of its video, one of its scene,
    which drifts, and noise. So the expected cosine of two frames of different videos is `common`,
    of two scenes of a video `common + of_video`, of two frames that follow each other in a scene
    `common + of_video + drift * of_scene`. The numbers are near those of a small network's
    embeddings of TVSum at two frames per second: medians of 0.64, 0.74 and 0.97.

    Raises:
      UserError: shares that are negative or more than 1 together, or another number out of range.
    """

    num_videos: int = 50
    video_frames: tuple[int, int] = (200, 900)  # fewest and most, drawn evenly
    scene_frames: tuple[int, int] = (4, 40)
    width: int = 512  # D
    # Directions are drawn in a subspace of so many dimensions: embeddings fill few of theirs, and
    # chance likeness of different things comes with that.
    rank: int = 26
    common: float = 0.6
    of_video: float = 0.12
    of_scene: float = 0.25  # what is missing to 1 is noise
    drift: float = 0.98  # correlation of a scene's direction from one frame to the next

    def __post_init__(self):
        shares = (self.common, self.of_video, self.of_scene)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise UserError(
                "common, of_video and of_scene are shares of 1, none negative, got "
                f"{self.common}, {self.of_video} and {self.of_scene}"
            )
        if not 0 <= self.drift <= 1:
            raise UserError(f"drift is a correlation in [0, 1], got {self.drift}")
        if not 2 <= self.rank <= self.width:
            raise UserError(
                f"rank must lie in [2, width], got rank {self.rank} and width {self.width}"
            )
        for name in ("video_frames", "scene_frames"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise UserError(f"{name} must be a fewest and a most, got {(fewest, most)}")
        if self.num_videos < 1:
            raise UserError(f"num_videos must be at least 1, got {self.num_videos}")


def draw_scenes(config: SceneConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Embeddings of made-up videos, float32[T, D] of unit length each.

    Args:
      config: what they consist of.
      rng: draws.
    """
    basis = np.linalg.qr(rng.standard_normal((config.width, config.rank)))[0].T  # [rank, D]
    # The first dimension of the subspace is the common direction's alone.
    common = math.sqrt(config.common) * basis[0]
    noise = math.sqrt(max(0.0, 1 - config.common - config.of_video - config.of_scene))

    def directions(n: int) -> np.ndarray:
        """float64[n, rank - 1] of expected squared length 1."""
        return rng.standard_normal((n, config.rank - 1)) / math.sqrt(config.rank - 1)

    videos = []
    for _ in range(config.num_videos):
        T = int(rng.integers(config.video_frames[0], config.video_frames[1] + 1))
        of_scene = directions(T)
        at = 0
        while at < T:
            length = int(rng.integers(config.scene_frames[0], config.scene_frames[1] + 1))
            for k in range(at + 1, min(at + length, T)):
                turn = math.sqrt(1 - config.drift**2) * of_scene[k]
                of_scene[k] = config.drift * of_scene[k - 1] + turn
            at += length
        own = math.sqrt(config.of_video) * directions(1) + math.sqrt(config.of_scene) * of_scene
        frames = common + own @ basis[1:]
        frames += noise / math.sqrt(config.width) * rng.standard_normal(frames.shape)
        videos.append(unit(frames.astype(np.float32)))
    return videos
