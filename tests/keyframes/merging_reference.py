"""Differential feature merging in float64, frame by frame, as ViLaMP's paper and code have it."""

import numpy as np

from deevisum_jax.keyframes.merging import PROJECTIONS
from deevisum_jax.keyframes.selection import Keyframes


def keyframes(*index, slots=None, num_frames=0):
    """Keyframes by hand, in so many slots; those not used come last."""
    K = slots or len(index)
    is_used = np.arange(K) < len(index)
    return Keyframes(
        index=np.array([*index, *[num_frames] * (K - len(index))], np.int32),
        is_used=is_used,
        is_filled=np.zeros(K, bool),
        relevance=np.zeros(K, np.float32),
    )


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params(width, query_width, seed=7):
    """Learned parameters, larger than they start so that they matter."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in PROJECTIONS:
        inputs = query_width if name == "query" else width
        made[name] = {
            "kernel": rng.normal(size=(inputs, width)).astype(np.float32),
            "bias": rng.normal(size=(width,)).astype(np.float32),
        }
    return {**made, "temperature": np.array([0.3], np.float32)}


def merged(patches, query, keys, config, params=None):
    """float64[N, D], of float[N, P, D], a query and the numbers of keyframes in order."""
    tokens = []
    for n in range(len(patches)):
        preceding = [slot for slot, key in enumerate(keys) if key <= n]
        if not preceding:
            reference = n
        elif config.reference == "fixed":
            reference = keys[preceding[-1]]
        else:
            reference = preceding[-1]
        tokens.append(token(patches[n], patches[reference], query, config, params))
    return np.stack(tokens)


def token(patches, references, query, config, params=None):
    """float64[D], of one frame's float[P, D] and what they are compared with."""
    patches, references = (np.asarray(x, np.float64) for x in (patches, references))
    query = np.asarray(query, np.float64)
    scores = []
    for patch, reference in zip(patches, references, strict=True):
        if config.projections:
            R = _cos(_linear(params["query"], query), _linear(params["image_query"], patch))
            T = _cos(_linear(params["key"], reference), _linear(params["image_key"], patch))
            alpha = float(params["temperature"][0])
        else:
            R, T, alpha = _cos(patch, query), _cos(patch, reference), config.temperature
        scores.append((R - config.redundancy_weight * T) / alpha)
    weights = np.exp(np.array(scores) - max(scores))
    return (weights / weights.sum()) @ patches


def _linear(params, x):
    return x @ params["kernel"].astype(np.float64) + params["bias"].astype(np.float64)


def _cos(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths else 0.0
