"""Simulated annotators: agreeing on what matters, each with taste, mood and noise of their own."""

from __future__ import annotations

import numpy as np

from tfds_builders.synthetic import scenario as scenario_lib

NUM_ANNOTATORS = 20  # as in TVSum

# Calibrated so that two annotators agree as in TVSum: Kendall's tau 0.18 over pairs, then videos.
TASTE = 0.35  # spread of an annotator's weight on each cause, relative to the common weight
DRIFT = 0.25  # slow mood: standard deviation, in units of importance
DRIFT_S = 10.0  # how long a mood lasts
NOISE = 1.13  # of every single point, in units of importance


def annotate(scenario: scenario_lib.Scenario) -> np.ndarray:
    """Scores 1 to 5 of every annotator for every point, float32[U, N]."""
    rng = scenario.rng("annotators")
    causes = scenario_lib.causes(scenario)
    parts = np.stack(
        [
            scenario_lib.SUBJECT_WEIGHT * causes.subject,
            scenario_lib.APPLAUSE_WEIGHT * causes.applause,
            scenario_lib.SALIENT_WEIGHT * causes.salient,
            scenario_lib.TOGETHER_WEIGHT * causes.subject * causes.applause,
        ]
    )
    shape = (NUM_ANNOTATORS, scenario.num_points)
    taste = 1 + TASTE * rng.standard_normal((NUM_ANNOTATORS, len(parts)))
    keep = np.exp(-scenario_lib.POINT_S / DRIFT_S)
    steps = rng.standard_normal(shape)
    drift = np.empty(shape)
    drift[:, 0] = steps[:, 0]
    for k in range(1, shape[1]):
        drift[:, k] = keep * drift[:, k - 1] + np.sqrt(1 - keep**2) * steps[:, k]
    felt = taste @ parts + DRIFT * drift + NOISE * rng.standard_normal(shape)
    # Everybody uses the five grades in their own way, and means of a few stay out of the ends.
    stretch = rng.uniform(0.8, 1.3, (NUM_ANNOTATORS, 1))
    offset = rng.uniform(1.3, 2.1, (NUM_ANNOTATORS, 1))
    return np.clip(np.round(offset + stretch * felt), 1, 5).astype(np.float32)
