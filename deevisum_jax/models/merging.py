"""What differential feature merging learns in its released mode; the rule is `keyframes.merging`.

Four linear layers with biases and a temperature, as in ViLaMP's released code: weights are drawn
from a normal of standard deviation 0.02. Of the temperature the logarithm is learned, as SigLIP's
is; the released code learns the number itself. Steps of Adam are as long as the learning rate: a
few of 2e-3 would take 0.01 to zero and below, where the least fitting patches weigh most.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deevisum_jax import fsdp
from deevisum_jax.keyframes import merging
from deevisum_jax.keyframes.merging import MergingConfig
from deevisum_jax.models import layers
from deevisum_jax.typing import Array

_STDDEV = 0.02


class _Linear(nnx.Module):
    """A kernel float[inputs, D] and a bias float[D]; `merging.merge` applies them."""

    AXES = ("norm", "embed")  # of the kernel, as in `sharding.PARAM_AXES`

    def __init__(self, inputs: int, width: int, *, param_dtype: str, rngs: nnx.Rngs):
        drawn = jax.random.normal(rngs.params(), (inputs, width), jnp.float32)
        self.kernel = nnx.Param((_STDDEV * drawn).astype(param_dtype))
        self.bias = layers.zeros((width,), param_dtype)

    def whole(self, dtype: Any) -> dict[str, jax.Array]:
        """Both, whole on every device and in the compute dtype."""
        kernel = fsdp.matrix(self.kernel[...], *self.AXES, dtype=dtype)  # [D, inputs]
        return {"kernel": kernel.T, "bias": self.bias[...].astype(dtype)}


class DifferentialMerging(nnx.Module):
    """One token of each frame that is no keyframe. Without projections there is nothing to learn.

    Args:
      config: how patches are weighed.
      width: D, of patches.
      query_width: E, of what the query is given in; without projections it is D.
      param_dtype: storage dtype, but for the temperature.
      rngs: stream `params`.
    """

    def __init__(
        self,
        config: MergingConfig,
        *,
        width: int,
        query_width: int,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.config = config
        if not config.projections:
            return
        for name in merging.PROJECTIONS:
            inputs = query_width if name == "query" else width
            setattr(self, name, _Linear(inputs, width, param_dtype=param_dtype, rngs=rngs))
        # Always float32: bfloat16 has no numbers close enough for a small step.
        self.log_temperature = nnx.Param(jnp.full((1,), math.log(config.temperature), jnp.float32))

    def __call__(self, patches: Array, references: Array, query: Array) -> jax.Array:
        """As `keyframes.merging.merge`.

        Args:
          patches: float[..., P, D].
          references: float[..., P, D].
          query: float[E].

        Returns:
          float[..., D] in the dtype of the patches.
        """
        params = self.whole(patches.dtype)
        return merging.merge(patches, references, query, config=self.config, params=params)

    def whole(self, dtype: Any) -> dict[str, Any] | None:
        """What `keyframes.merging.merge` takes as `params`, whole on every device.

        For what merges in many chunks, and gathers weights once. None without projections.
        """
        if not self.config.projections:
            return None
        params = {name: getattr(self, name).whole(dtype) for name in merging.PROJECTIONS}
        return {**params, "temperature": jnp.exp(self.log_temperature[...])}
