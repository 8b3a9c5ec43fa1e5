"""From scores to the chosen shots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.summary.knapsack import knapsack
from deevisum_jax.summary.shots import Shot

# A film's knapsack counts in parts of the budget: milliseconds, or for long films (from 50 s of
# summary) a little more, since its table has a cell for every shot and part.
_MAX_BUDGET_PARTS = 50_000

DEFAULT_BUDGET = 0.15  # of the frames, the field's convention since TVSum (Song et al. 2015)


def shot_scores(frame_scores: np.ndarray, shots: Sequence[Shot] | np.ndarray) -> np.ndarray:
    """float64[S]: the mean score of each shot's frames.

    Args:
      frame_scores: float[n_frames].
      shots: `Shot`s, or int[S, 2] of native frames, half-open.

    Raises:
      UserError: a shot is empty or reaches past the frames.
    """
    frame_scores = np.asarray(frame_scores, np.float64)
    bounds = shot_bounds(shots)
    if len(bounds) and (
        bounds.min() < 0 or bounds.max() > len(frame_scores) or (bounds[:, 1] <= bounds[:, 0]).any()
    ):
        raise UserError(
            f"shots must be non-empty and lie in [0, {len(frame_scores)}] frames, got bounds from "
            f"{bounds.min()} to {bounds.max()}; shots are half-open in native frames"
        )
    total = np.concatenate([[0.0], np.cumsum(frame_scores)])
    means = (total[bounds[:, 1]] - total[bounds[:, 0]]) / (bounds[:, 1] - bounds[:, 0])
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
    if not 0 < budget <= 1:
        raise UserError(
            f"the budget is a share of the video in (0, 1], got {budget}; 0.15 is usual"
        )
    # The nudge keeps 0.15 * 100 at 15 although the product is 14.999999999999998.
    return knapsack(shot_scores, shot_lengths_frames, int(np.floor(budget * n_frames + 1e-9)))


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
