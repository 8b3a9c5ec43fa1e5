"""What a long video takes, on one chip that is not there, until it is keyframes and merged tokens.

One program: the frames lie on the chip and are encoded in chunks, once by a tower with a pooling
head, whose embeddings keyframes are chosen by (DKS), and once by the model's own, whose patches
are merged (DFM). Both towers have the sizes of the model's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deevisum_jax import experiment, sharding
from deevisum_jax.config import Config
from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import merging, stream
from deevisum_jax.keyframes.merging import MergingConfig
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models import pytree
from deevisum_jax.models.merging import DifferentialMerging
from deevisum_jax.models.paligemma2 import PaliGemma2Config
from deevisum_jax.models.siglip import Siglip
from deevisum_jax.models.two_towers import ImageTower
from deevisum_jax.planner import environment, model_flops
from deevisum_jax.planner import plan as plans
from deevisum_jax.planner.chips import Topology
from deevisum_jax.planner.plan import Made, Plan
from deevisum_jax.typing import Array

KEYFRAMES = 32  # where a config names none
# How patches are merged, by what it is in words.
PARTS = {
    "raw patches": MergingConfig(projections=False),
    "learned projections": MergingConfig(projections=True),
}


def plan(
    config: Config, topology: Topology, num_frames: int, keep: Callable[[Plan], None]
) -> tuple[Plan, ...]:
    """Compiles the whole way of a video, for each of `PARTS`.

    Args:
      config: an experiment, or one of its stages. `eval.batch_size` frames are encoded at a time,
        keyframes are as many as `model.merge` has, or 32; `mesh` is not read.
      topology: one chip.
      num_frames: of the video.
      keep: is given each plan as it is made; a compilation may take minutes.

    Raises:
      UserError: more chips than one, fewer frames than one; or as `experiment.model_config`.
    """
    if topology.num_chips != 1:
        raise UserError(
            f"a long video is planned for one chip, {topology.name} has {topology.num_chips}; "
            "give --topology v5e:1x1 or v6e:1x1"
        )
    if num_frames < 1:
        raise UserError(f"--num_frames {num_frames} is no video; give at least 1")
    mesh = sharding.make_mesh(devices=environment.devices(topology))
    found = []
    for part in PARTS:
        made = _made(config, mesh, num_frames, part)
        found.append(plans.planned(made, topology, "long_video", mesh))
        keep(found[-1])
    return tuple(found)


class _Condenser(nnx.Module):
    """All parameters, and what is done with them."""

    def __init__(self, config: tuple[PaliGemma2Config, MergingConfig], *, rngs: nnx.Rngs):
        self.model, self.config = config
        width, kwargs = self.model.llm.width, {"param_dtype": self.model.param_dtype, "rngs": rngs}
        self.tower = ImageTower(self.model.img, **kwargs)
        self.img = Siglip(self.model.img, out_width=width, **kwargs)
        self.merge = DifferentialMerging(self.config, width=width, query_width=width, **kwargs)

    def embed(self, frames: Array) -> jax.Array:
        """uint8[C, H, W, 3] -> float32[C, E]."""
        return self.tower(self._pixels(frames)).astype(jnp.float32)

    def patches(self, frames: Array) -> jax.Array:
        """uint8[C, H, W, 3] -> float[C, P, D]."""
        return self.img(self._pixels(frames))

    def condense(
        self, frames: Array, query: Array, patch_query: Array, *, num_keyframes: int, size: int
    ) -> stream.Condensed:
        """The whole way of uint8[N, H, W, 3], `size` frames at a time."""
        return stream.condense_on_device(
            frames,
            self.embed,
            self.patches,
            chunk_size=size,
            query=query,
            patch_query=patch_query,
            selection=SelectionConfig(num_keyframes=num_keyframes),
            merging=self.config,
            params=self.merge.whole(self.model.dtype),
        )

    def one_chunk(self, frames: Array, patch_query: Array) -> Any:
        """What is done with each chunk, of which FLOPs are counted."""
        patches = self.patches(frames)
        params = self.merge.whole(self.model.dtype)
        merged = merging.merge(patches, patches, patch_query, config=self.config, params=params)
        return self.embed(frames), merged

    def _pixels(self, frames: Array) -> jax.Array:
        return (jnp.asarray(frames, jnp.float32) / 127.5 - 1.0).astype(self.model.dtype)


def _made(config: Config, mesh: jax.sharding.Mesh, num_frames: int, part: str) -> Made:
    model = experiment.model_config(config)
    size = min(config.eval.batch_size, num_frames)
    bind = functools.partial(pytree.bind, _Condenser, (model, PARTS[part]))
    params = pytree.abstract(_Condenser, (model, PARTS[part]))
    pictures = (model.img.image_size, model.img.image_size, 3)
    query, patch_query = (
        jax.ShapeDtypeStruct((width,), jnp.float32) for width in (model.img.width, model.llm.width)
    )
    given = (params, jax.ShapeDtypeStruct((num_frames, *pictures), jnp.uint8), query, patch_query)
    where = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), given)
    num_keyframes = config.model.merge.num_keyframes or KEYFRAMES

    def condense(params: Any, *given: Array) -> stream.Condensed:
        return bind(params).condense(*given, num_keyframes=num_keyframes, size=size)

    # Counted of one frame: the choice of keyframes is a loop whose trips nobody knows, of few
    # FLOPs. That references are encoded once more is nothing that a video asks for.
    one_frame = model_flops.count(
        lambda params, *given: bind(params).one_chunk(*given),
        params,
        jax.ShapeDtypeStruct((1, *pictures), jnp.uint8),
        patch_query,
    )
    return Made(
        lower=functools.partial(jax.jit(condense).lower, *sharding.abstract(given, where)),
        batch_size=size,
        params=params,
        model_flops=num_frames * one_frame,
        placed=list(plans.placement(*({"params": a[0], "frames": a[1]} for a in (given, where)))),
        part=part,
        notes=(f"{num_frames} frames, {num_keyframes} of them keyframes",),
    )
