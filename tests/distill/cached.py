"""A teacher of ten segments whose outputs can be told by hand, and its cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deevisum_jax import distributed, sharding
from deevisum_jax.data import pipeline
from deevisum_jax.distill.cache import Identity, write
from deevisum_jax.typing import Batch, TeacherOutputs

NUM, PER_FILE = 10, 4  # segments; files of 4, 4 and 2
FIRST_OF_SECOND_VIDEO = 4

IDENTITY = Identity(
    weights="ab" * 32,
    data={"data_set": "synthetic/tiny/1.0.0", "train": 6, "num_frames": 1},
    prompt={"template": "cd" * 32, "tokenizer": "ef" * 32},
    image_size=28,
    asked={"positions": "suffix", "top_k": 3, "temperature": 2.0, "layers": [4]},
)


class Segments:
    """Segment i has the token i; four are of the first video, six of the second."""

    def __init__(self, kill_at: int | None = None) -> None:
        """Reading the segment `kill_at` ends this process as a lost machine does."""
        self.kill_at = kill_at

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        video = int(index >= FIRST_OF_SECOND_VIDEO)
        return {
            "frames": np.zeros((1, 1, 1, 3), np.uint8),
            "tokens": np.array([index], np.int32),
            **{name: np.zeros(1, bool) for name in ("mask_ar", "mask_input", "mask_loss")},
            "label": np.int32(0),
            "score": np.float32(0),
            "video_id": np.int32(video),
            "segment": np.int32(index - video * FIRST_OF_SECOND_VIDEO),
            "valid": np.True_,
        }


@jax.jit
def say(batch: Batch) -> TeacherOutputs:
    """Numbers that no other segment has; token ids are 10 i, 10 i + 1, 10 i + 2 at two targets."""
    i = batch.tokens[:, 0]
    x = i.astype(jnp.float32)
    ids = 10 * i[:, None, None] + jnp.arange(3)
    return TeacherOutputs(
        class_logits=jnp.stack([x / 7, -x / 3], axis=1),
        importance=x * jnp.float32(1e-30),
        token_ids=jnp.broadcast_to(ids, (len(i), 2, 3)).astype(jnp.int32),
        token_log_probs=-1 / (1 + x[:, None, None] + jnp.arange(8.0).reshape(2, 4)),
    )


def said_of(index: int) -> dict[str, np.ndarray]:
    """What a cache is to have of a segment, from `say` itself."""
    [batch] = pipeline.in_order(Segments(), batch_size=NUM)
    outputs = say(sharding.place_batch(batch, one_device()))
    named = vars(outputs) | {}
    return {name: np.asarray(rows)[index] for name, rows in named.items() if rows is not None}


def one_device() -> jax.sharding.Mesh:
    """A mesh."""
    return sharding.make_mesh(devices=jax.local_devices()[:1])


def write_cache(
    folder: epath.Path,
    *,
    say: Callable[[Batch], TeacherOutputs] = say,
    identity: Identity = IDENTITY,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 8,
    stop_at: int = NUM,
    kill_at: int | None = None,
    **changes: Any,
) -> list[int]:
    """Writes it; returns the first segments of the batches that were scored.

    Args:
      folder: of the cache.
      say: the teacher.
      identity: of its outputs.
      mesh: where it runs.
      batch_size: global.
      stop_at: the segment before which a run is interrupted.
      kill_at: of `Segments`.
      **changes: of `cache.write`.
    """
    mesh = one_device() if mesh is None else mesh
    rows = distributed.own_rows(sharding.batch_sharding(mesh), batch_size)
    began = []

    def batches(first: int) -> Iterator[pipeline.Row]:
        for batch in pipeline.in_order(
            Segments(kill_at), batch_size=batch_size, rows=rows, first=first
        ):
            if batch["tokens"].max() >= stop_at:
                raise InterruptedError
            began.append(int(batch["tokens"][0, 0]))
            yield batch

    write(
        folder,
        identity,
        say,
        batches,
        mesh,
        **{
            "num_examples": NUM,
            "describe": lambda row, segment: {"video_id": "ab"[row], "segment": segment},
            "examples_per_file": PER_FILE,
        }
        | changes,
    )
    return began
