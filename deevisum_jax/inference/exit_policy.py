"""When a segment leaves: how sure an exit is, and how sure is sure enough.

An exit says how likely the summary class is, how important the segment is, and how near it comes to
the prototype of the summary class. Four readings of that are at hand as confidence, all of them
larger where the exit is surer, of a "no" as well as of a "yes":

    max_probability   probability of the likelier of the two classes, from 1/2
    entropy           1 less the entropy of the classes in bits, from 0: of two classes this orders
                      segments as max_probability does, on another scale
    cosine            to the prototype, without its sign, from 0 (DEEVISum's confidence; there it
                      has a sign, so that nothing but a sure "yes" can leave)
    agreement         1 less what the probability or the importance has changed since the exit
                      before, the more of the two, from 0; the first exit agrees with nobody

The same functions read arrays of a host and of a device.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deevisum_jax.errors import UserError, closest
from deevisum_jax.typing import CONFIDENCES, Array, SegmentScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """A segment leaves at the first exit whose confidence reaches the threshold, else at the last.

    Raises:
      UserError: an unknown confidence, or a threshold that it cannot have.
    """

    confidence: str  # of CONFIDENCES
    # One per exit but the last; infinity: nobody leaves there.
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise UserError(
                f"exit confidence {self.confidence!r}; {closest(str(self.confidence), CONFIDENCES)}"
            )
        low, high = CONFIDENCES[self.confidence]
        for threshold in self.thresholds:
            if not (low <= threshold <= high or threshold == math.inf):
                raise UserError(
                    f"exit threshold {threshold} is not within [{low:g}, {high:g}], where the "
                    f"confidence {self.confidence!r} lies"
                )

    @classmethod
    def of(cls, thresholds: float | Sequence[float], num_exits: int, confidence: str) -> ExitPolicy:
        """One threshold for all exits, or one for each but the last.

        Raises:
          UserError: there are more thresholds, or fewer; or as the class.
        """
        given = (thresholds,) if isinstance(thresholds, numbers.Real) else tuple(thresholds)
        cls(confidence=confidence, thresholds=given)  # also those that no exit is left for
        if len(given) not in (1, num_exits - 1):
            raise UserError(
                f"got {len(given)} exit thresholds ({', '.join(f'{t:g}' for t in given)}); give "
                f"one for all, or {num_exits - 1}: one for each of {num_exits} exits but the last"
            )
        if len(given) == 1:
            given *= num_exits - 1
        return cls(confidence=confidence, thresholds=given)

    @classmethod
    def off(cls, num_exits: int) -> ExitPolicy:
        """Every segment runs every layer."""
        return cls(confidence="max_probability", thresholds=(math.inf,) * (num_exits - 1))

    def can_leave(self, exit_: int) -> bool:
        """Whether a segment can leave at an exit before the last."""
        alone = self.confidence == "agreement" and exit_ == 0  # it agrees with nobody
        return self.thresholds[exit_] < math.inf and not alone

    @property
    def is_off(self) -> bool:
        """Whether every segment runs every layer."""
        return not any(self.can_leave(x) for x in range(len(self.thresholds)))

    def to_json(self) -> dict[str, Any]:
        """For files; an infinite threshold is null there."""
        finite = [None if t == math.inf else t for t in self.thresholds]
        return {"confidence": self.confidence, "thresholds": finite}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ExitPolicy:
        """Of `to_json`.

        Raises:
          UserError: as the class.
        """
        thresholds = (math.inf if t is None else float(t) for t in found["thresholds"])
        return cls(confidence=found["confidence"], thresholds=tuple(thresholds))

    def exit_index(self, scores: SegmentScores) -> np.ndarray:
        """The exit that each segment leaves at: `int[M]`, of all exits' scores `[X, M]`.

        By hand: of two segments that three exits are sure of by 0.95, 0.5, 0.1 and by 0.6, 0.7, 0.8
        the thresholds (0.9, 0.9) let the first leave at exit 0 and the second at exit 2.
        """
        X = len(scores.importance)
        if len(self.thresholds) != X - 1:
            raise UserError(
                f"{len(self.thresholds)} exit thresholds are those of a model with "
                f"{len(self.thresholds) + 1} exits, and this one has {X}"
            )
        rows = [scores.at(x) for x in range(X)]
        sure = [self.is_sure(x, rows[x], rows[x - 1] if x else None) for x in range(X)]
        return np.argmax(sure, axis=0)

    def is_sure(self, exit_: int, now: SegmentScores, before: SegmentScores | None) -> Array:
        """Whether segments leave at an exit, `bool[M]`; at the last, all do.

        Args:
          exit_: row of the exit.
          now: what it says, `float32[M]` each.
          before: what the exit before it said; None at the first.
        """
        xp = now.importance.__array_namespace__()
        if exit_ == len(self.thresholds):  # also with what is no number
            return xp.ones(now.importance.shape, bool)
        return confidence(self.confidence, now, before) >= np.float32(self.thresholds[exit_])


def describe(policy: ExitPolicy, exit_layers: Sequence[int]) -> str:
    """A policy in words, such as `max_probability from 0.99 at layer 2, 0.5 at layer 4`."""
    where = [
        f"{threshold:.4g} at layer {exit_layers[x]}"
        for x, threshold in enumerate(policy.thresholds)
        if policy.can_leave(x)
    ]
    return f"{policy.confidence} from {', '.join(where)}" if where else "off"


def confidence(kind: str, now: SegmentScores, before: SegmentScores | None) -> Array:
    """How sure an exit is of each segment.

    Args:
      kind: of `CONFIDENCES`.
      now: what the exit says, `float32[M]` each.
      before: what the exit before said; None at the first.

    Returns:
      `float32[M]`, within the range of the kind; -1 where nothing can be said.
    """
    p, xp = now.summary_prob, now.summary_prob.__array_namespace__()
    if kind == "max_probability":
        return xp.maximum(p, 1 - p)
    if kind == "entropy":
        q = xp.clip(xp.stack([p, 1 - p]), 1e-12, 1.0)
        return 1 + xp.sum(q * xp.log2(q), axis=0)
    if kind == "cosine":
        return xp.abs(now.cosine)
    assert kind == "agreement", kind
    if before is None:
        return xp.full_like(p, -1.0)
    changes = (p - before.summary_prob, now.importance - before.importance)
    return 1 - xp.maximum(*map(xp.abs, changes))
