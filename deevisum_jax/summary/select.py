"""From scores to the chosen shots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.summary.knapsack import knapsack, knapsack_rows
from deevisum_jax.summary.shots import Shot

# A film's knapsack counts in parts of the budget: milliseconds, or for long films (from 50 s of
# summary) a little more, since its table has a cell for every shot and part.
_MAX_BUDGET_PARTS = 50_000

DEFAULT_BUDGET = 0.15  # of the frames, the field's convention since TVSum (Song et al. 2015)


def shot_scores(frame_scores: np.ndarray, shots: Sequence[Shot] | np.ndarray) -> np.ndarray:
    """float64[..., S]: the mean score of each shot's frames.

    Args:
      frame_scores: float[..., n_frames], of one or of several people.
      shots: `Shot`s, or int[S, 2] of native frames, half-open.

    Raises:
      UserError: a shot is empty or reaches past the frames.
    """
    frame_scores = np.asarray(frame_scores, np.float64)
    n_frames = frame_scores.shape[-1]
    bounds = shot_bounds(shots)
    if len(bounds) and (
        bounds.min() < 0 or bounds.max() > n_frames or (bounds[:, 1] <= bounds[:, 0]).any()
    ):
        raise UserError(
            f"shots must be non-empty and lie in [0, {n_frames}] frames, got bounds from "
            f"{bounds.min()} to {bounds.max()}; shots are half-open in native frames"
        )
    total = np.zeros((*frame_scores.shape[:-1], n_frames + 1))
    np.cumsum(frame_scores, axis=-1, out=total[..., 1:])
    starts, ends = bounds.T
    means = (total[..., ends] - total[..., starts]) / (ends - starts)
    return means.round(12)  # equal scores must tie in the knapsack whatever the sums' rounding


def shot_bounds(shots: Sequence[Shot] | np.ndarray) -> np.ndarray:
    """int64[S, 2]: first frame and end frame (not included) of each shot."""
    if not isinstance(shots, np.ndarray):
        shots = np.array([(shot.start_frame, shot.end_frame) for shot in shots])
    return shots.astype(np.int64).reshape(-1, 2)


def select_summary(
    shot_scores: np.ndarray,
    shot_lengths_frames: np.ndarray,
    n_frames: int,
    budget: float = DEFAULT_BUDGET,
) -> np.ndarray:
    """The shots with the greatest total score whose length fits the budget.

    Args:
      shot_scores: float[S], the mean score of each shot; not multiplied by its length, as in the
        published evaluations, so of two equal scores the shorter shot is the cheaper one.
      shot_lengths_frames: int[S], native frames.
      n_frames: length of the whole video.
      budget: the share of the video that the summary may fill, in (0, 1].

    Returns:
      bool[S], 1 = selected. At most floor(budget * n_frames) frames.

    Raises:
      UserError: the budget is outside (0, 1], or scores and lengths do not fit (see `knapsack`).
    """
    return knapsack(shot_scores, shot_lengths_frames, budget_frames(n_frames, budget))


def annotator_summaries(
    user_scores: np.ndarray,
    shots: Sequence[Shot] | np.ndarray,
    n_frames: int,
    budget: float = DEFAULT_BUDGET,
) -> np.ndarray:
    """Every annotator's summary, made of their scores as a prediction's is (`select_summary`).

    The way the community's TVSum files came to theirs (Zhang et al. 2016).

    Args:
      user_scores: float[U, n_frames], each annotator's score of every native frame.
      shots: `Shot`s, or int[S, 2] of native frames, half-open.
      n_frames: length of the whole video.
      budget: the share of the video that a summary may fill, in (0, 1].

    Returns:
      bool[U, n_frames], 1 = frame is in the annotator's summary.

    Raises:
      UserError: there are not n_frames scores, one is not a finite number, a shot is empty or
        reaches past the frames, or the budget is outside (0, 1].
    """
    user_scores = np.asarray(user_scores)
    if user_scores.ndim != 2 or user_scores.shape[1] != n_frames:
        raise UserError(
            f"annotators' scores must be [annotators, {n_frames} frames], got "
            f"{list(user_scores.shape)}; hold each score until the next annotated frame"
        )
    bounds = shot_bounds(shots)
    chosen = knapsack_rows(
        shot_scores(user_scores, bounds), np.diff(bounds)[:, 0], budget_frames(n_frames, budget)
    )
    summaries = np.zeros(user_scores.shape, bool)
    for s, (start, end) in enumerate(bounds.tolist()):
        summaries[:, start:end] = chosen[:, s, None]
    return summaries


def budget_frames(n_frames: int, budget: float = DEFAULT_BUDGET) -> int:
    """How many of a video's frames a summary may have: floor(budget * n_frames).

    Raises:
      UserError: the budget is outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise UserError(
            f"the budget is a share of the video in (0, 1], got {budget}; 0.15 is usual"
        )
    # The nudge keeps 0.29 * 100 at 29 although the product is 28.999999999999996.
    return math.floor(budget * n_frames + 1e-9)


def select_film(shot_scores: np.ndarray, lengths_s: np.ndarray, budget_s: float) -> np.ndarray:
    """The shots of a summary that people watch, rather than one that is held against annotators.

    Differs from `select_summary` in two ways. A shot is worth its score times its length: with the
    bare means of the published evaluations, the shortest scraps win. And it counts in time, since
    frame rates may vary.

    Args:
      shot_scores: float[S], the mean score of each shot.
      lengths_s: float[S], seconds.
      budget_s: seconds that the summary may last.

    Returns:
      bool[S], 1 = selected. Together at most `budget_s`.
    """
    parts = min(math.ceil(1000 * budget_s), _MAX_BUDGET_PARTS)
    # The nudge takes a shot exactly as long as the budget for what it is.
    weights = np.ceil(parts * lengths_s / budget_s - 1e-6).astype(int)
    return knapsack(shot_scores * lengths_s, weights, parts)
