"""Other ways to choose K frames, which keyframe selection is held against. numpy, on the host.

Each takes the embeddings of all frames and gives the chosen frames in time order. Embeddings need
no unit length; all similarities are cosines. A frame whose embedding is zero has cosine 0 with
everything.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.cluster import vq

from deevisum_jax.errors import UserError

# Of Lloyd's algorithm. On frames of videos the centres' frames hardly change after that.
_KMEANS_STEPS = 20
_SAME = 1e-6  # squared distance of unit embeddings up to which they are the same


def uniform(num_frames: int, num_keyframes: int) -> np.ndarray:
    """The middles of K equal parts of the video: frame floor((k + 1/2) N / K).

    Args:
      num_frames: N.
      num_keyframes: K; with more than N, all frames are taken.

    Returns:
      int64[min(K, N)], ascending.

    Raises:
      UserError: a number is less than 1.
    """
    K = _budget(num_frames, num_keyframes)
    return (2 * np.arange(K) + 1) * num_frames // (2 * K)


def top_k(embeddings: np.ndarray, query: np.ndarray, num_keyframes: int) -> np.ndarray:
    """The K frames nearest to the query, however alike they are; of equal ones the earlier.

    Args:
      embeddings: float[N, D].
      query: float[D].
      num_keyframes: K; with more than N, all frames are taken.

    Returns:
      int64[min(K, N)], ascending.

    Raises:
      UserError: no frames, K less than 1, or a query of another width.
    """
    relevance = unit(embeddings) @ _unit_query(embeddings, query)
    K = _budget(len(relevance), num_keyframes)
    return np.sort(np.argsort(-relevance, kind="stable")[:K])


def maximal_marginal_relevance(
    embeddings: np.ndarray, query: np.ndarray, num_keyframes: int, *, relevance_weight: float
) -> np.ndarray:
    """MMR (Carbonell & Goldstein, SIGIR 1998): relevant to the query, and unlike what is chosen.

    One frame after the other, that of the greatest

        lambda cos(frame, query) - (1 - lambda) max over chosen frames of cos(frame, chosen)

    is chosen; the first is the most relevant one. Takes O(N K D) time.

    Args:
      embeddings: float[N, D].
      query: float[D].
      num_keyframes: K; with more than N, all frames are taken.
      relevance_weight: lambda, in [0, 1]. The paper proposes 0.3 to see what there is around a
        query, and 0.7 to focus on it.

    Returns:
      int64[min(K, N)], ascending.

    Raises:
      UserError: as `top_k`, or lambda is outside [0, 1].
    """
    if not 0 <= relevance_weight <= 1:
        raise UserError(f"lambda is a share in [0, 1], got {relevance_weight}; 0.7 is usual")
    frames = unit(embeddings)
    relevance = frames @ _unit_query(embeddings, query)
    K = _budget(len(frames), num_keyframes)
    chosen = np.empty(K, np.int64)
    chosen[0] = relevance.argmax()
    redundancy = np.full(len(frames), -np.inf, relevance.dtype)
    for k in range(1, K):
        np.maximum(redundancy, frames @ frames[chosen[k - 1]], out=redundancy)
        marginal = relevance_weight * relevance - (1 - relevance_weight) * redundancy
        marginal[chosen[:k]] = -np.inf
        chosen[k] = marginal.argmax()
    return np.sort(chosen)


def k_means(embeddings: np.ndarray, num_keyframes: int, rng: np.random.Generator) -> np.ndarray:
    """Of each of K clusters the frame nearest to its centre; blind to a query.

    Lloyd's algorithm on unit embeddings from centres drawn by k-means++ (Arthur & Vassilvitskii,
    SODA 2007). A cluster that loses its frames keeps its centre.

    Args:
      embeddings: float[N, D].
      num_keyframes: K; with more than N, all frames are taken.
      rng: draws the first centres.

    Returns:
      int64[at most min(K, N)], ascending: fewer where a frame is the nearest to two centres, as
      with less than K different frames.

    Raises:
      UserError: no frames, or K less than 1.
    """
    frames = unit(embeddings)
    K = _budget(len(frames), num_keyframes)
    if len(frames) <= num_keyframes:
        return np.arange(K)
    with warnings.catch_warnings():
        # An empty cluster is no mistake here: videos hold still.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centres, _ = vq.kmeans2(
            frames, _first_centres(frames, K, rng), iter=_KMEANS_STEPS, minit="matrix"
        )
    # |f - c|² = 1 - 2 f.c + |c|², and 1 and |c|² are the same for all frames of a centre.
    return np.unique((frames @ centres.T).argmax(0))


def _first_centres(frames: np.ndarray, K: int, rng: np.random.Generator) -> np.ndarray:
    """float[K, D]: rows drawn one by one, with odds as the squared distance to the nearest drawn.

    scipy's own start does the same, but measures the distances to all that are drawn every time.
    """
    squares = np.einsum("ND,ND->N", frames, frames)  # 1, but for zeros
    drawn = [int(rng.integers(len(frames)))]
    away = np.full(len(frames), np.inf)
    for _ in range(1, K):
        last = drawn[-1]
        to_last = squares + squares[last] - 2 * (frames @ frames[last])
        # Rounding leaves something between equal frames, even less than nothing.
        to_last[to_last < _SAME] = 0
        np.minimum(away, to_last, out=away)
        total = away.sum()
        if total > 0:
            drawn.append(int(rng.choice(len(frames), p=away / total)))
        else:  # fewer than K different frames
            drawn.append(int(rng.integers(len(frames))))
    return frames[drawn]


def unit(embeddings: np.ndarray) -> np.ndarray:
    """float[N, D], or float[D] -> the same with rows of length 1, float32 at least; zeros stay."""
    embeddings = np.asarray(embeddings)
    embeddings = embeddings.astype(np.result_type(embeddings.dtype, np.float32), copy=False)
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.where(lengths > 0, lengths, 1)


def _unit_query(embeddings: np.ndarray, query: np.ndarray) -> np.ndarray:
    if np.shape(query) != np.shape(embeddings)[1:]:
        raise UserError(
            f"the query is of shape {list(np.shape(query))}, the frames' embeddings of shape "
            f"{list(np.shape(embeddings))}; embed both with one model"
        )
    return unit(query)


def _budget(num_frames: int, num_keyframes: int) -> int:
    if num_frames < 1:
        raise UserError("there are no frames to choose from; give at least one")
    if num_keyframes < 1:
        raise UserError(f"num_keyframes must be at least 1, got {num_keyframes}")
    return min(num_frames, num_keyframes)
