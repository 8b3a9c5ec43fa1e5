"""ViLaMP's keyframe selection in float64 numpy, loop by loop as it was published.

The walk is algorithm 1 of the paper, and llava/model/multimodal_resampler/frame_selector.py of the
release with its relevance floor; `distribute_frames` is the latter's. It has a matrix of all
similarities, and no masks: frames that are none are taken out before.
"""

from __future__ import annotations

import numpy as np


def cosines(embeddings: np.ndarray, query: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Relevance float64[N] and similarities float64[N, N].

    The sums of a row of relevance do not depend on where it stands, as they do in a BLAS.
    """
    embeddings = embeddings.astype(np.float64)
    units = embeddings / _lengths(embeddings)[:, None]
    has_query = query is not None
    # No query is not in the paper. Of the mean only the direction counts.
    query = query.astype(np.float64) if has_query else units.sum(0)
    relevance = (units * query).sum(1) / _lengths(query[None])[0]
    if not has_query:
        # What is equal on paper (two scenes as far from the mean of both) is so here.
        relevance = np.round(relevance * 2.0**40) / 2.0**40
    return relevance, units @ units.T


def _lengths(rows: np.ndarray) -> np.ndarray:
    lengths = np.sqrt((rows * rows).sum(1))
    return np.where(lengths > 0, lengths, 1)


def walk(
    relevance: np.ndarray,
    similarity: np.ndarray,
    *,
    num_keyframes: int,
    tau: float,
    reject: str,
    floor: float | None,
) -> list[int]:
    """The frames that the walk keeps, in the order in which it does."""
    repeats = similarity > tau if reject == ">" else similarity >= tau
    visited = np.zeros(len(relevance), bool)
    selected: list[int] = []
    for frame in np.argsort(-relevance, kind="stable"):
        if len(selected) == num_keyframes:
            break
        if floor is not None and relevance[frame] < floor:
            break
        if visited[frame]:
            continue
        selected.append(int(frame))
        visited |= repeats[frame]
    return selected


def distribute_frames(selected: list[int], num_frames: int, num_keyframes: int) -> list[int]:
    """All frames that are chosen when the unused budget is spread over the gaps."""
    selected = sorted(selected)
    budget = num_keyframes - len(selected)
    chosen = set(selected)
    gaps = []
    for before, behind in zip([-1, *selected], [*selected, num_frames], strict=True):
        if before + 1 < behind:
            gaps.append((before + 1, behind - 1))

    def extra(every: int) -> list[int]:
        return [-(-(end - start + 1) // every) - 1 for start, end in gaps]

    low, high = 1, num_frames
    while low < high:
        middle = (low + high) // 2
        if sum(extra(middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    for (start, end), count in zip(gaps, extra(low), strict=True):
        step = -(-(end - start + 1) // (count + 1))
        for i in range(count):
            chosen.add(min(start + step * (i + 1), end))
    for start, end in reversed(gaps):
        for frame in range(end, start - 1, -1):
            if len(chosen) < num_keyframes:
                chosen.add(frame)
    return sorted(chosen)


def select(
    embeddings: np.ndarray,
    query: np.ndarray | None,
    *,
    num_keyframes: int,
    tau: float,
    reject: str,
    floor: float | None,
    fill: bool,
) -> tuple[list[int], list[int]]:
    """The frames chosen, in the order of time, and those of them that the walk kept."""
    relevance, similarity = cosines(embeddings, query)
    kept = walk(
        relevance,
        similarity,
        num_keyframes=num_keyframes,
        tau=tau,
        reject=reject,
        floor=floor,
    )
    chosen = distribute_frames(kept, len(embeddings), num_keyframes) if fill else sorted(kept)
    return chosen, sorted(kept)
