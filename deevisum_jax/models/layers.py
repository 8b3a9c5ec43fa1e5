"""The parts that both towers are built from.

Einsum letters as in `deevisum_jax.typing`. Two dtypes run through: parameters are stored in
`param_dtype` and cast to the compute dtype, which is the dtype of the activations `x`, where they
are used. The islands of float32 are marked in the code: norms, RoPE, attention logits and softmax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from qwix import QArray

from deevisum_jax import fsdp
from deevisum_jax.errors import UserError, closest
from deevisum_jax.typing import Array

# What masked attention logits are set to; finite, so that a row with no key stays free of NaN.
K_MASK = -2.3819763e38

_OUTPUTS = "outputs"  # of attention and MLP, back at the model's width

# What the backward pass finds already computed, by the name of JAX's checkpoint policy. One is
# ours: the output of an MLP is dear to compute again and small to keep.
REMAT_POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "outputs_saveable": jax.checkpoint_policies.save_only_these_names(_OUTPUTS),
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def fan_in_init(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: str) -> nnx.Param:
    """A weight drawn from a normal of standard deviation `fan_in ** -0.5`, cut at two of them.

    Inputs of unit variance then give outputs of unit variance (LeCun et al. 1998); the division
    makes good for the cut.
    """
    stddev = fan_in**-0.5 / 0.87962566103423978
    # The same numbers either way. In many dimensions XLA takes ten times as long to compile the
    # random bits on a CPU; flat ones cannot be split over a mesh, which matters for large weights.
    size = math.prod(shape)
    drawn = shape if size > 2**22 else (size,)
    w = stddev * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, drawn, jnp.float32)
    return nnx.Param(w.reshape(shape).astype(dtype))


def zeros(shape: tuple[int, ...], dtype: str) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`, smoothly within ±cap; 0 means no cap. Keeps order."""
    return cap * jnp.tanh(x / cap) if cap else x


@jax.custom_vjp
def gated_gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gelu(gate) * up` with the tanh approximation, in the dtype of `gate`."""
    return _gated_gelu(gate, up)


def _gated_gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=True) * up


def _gated_gelu_bwd(
    kept: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, vjp = jax.vjp(_gated_gelu, *kept)
    # Each is read by two matrix products. Without the barrier a TPU's compiler computes them anew
    # within each one, which then waits for the vector unit.
    return jax.lax.optimization_barrier(vjp(grad))


gated_gelu.defvjp(lambda gate, up: (_gated_gelu(gate, up), (gate, up)), _gated_gelu_bwd)


# Sine and cosine of what each position turns the pairs of a head by, float32[B, T, H/2] each.
Rotation = tuple[jax.Array, jax.Array]


def rotation(positions: Array, head_dim: int, base: float = 10_000.0) -> Rotation:
    """The angles of `rope`, which are the same in all layers.

    Args:
      positions: int32[B, T].
      head_dim: H.
      base: the longest wavelength is 2 pi times this.
    """
    # float32: bfloat16 has no 257, let alone its sine.
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.asarray(positions, jnp.float32)[:, :, None] * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rope(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) on split halves.

    The pair `(x[i], x[i + H/2])` is turned by the angle `position * base ** (-2 i / H)`: at
    position 0 nothing moves, and the first pair turns by one radian per position.

    Args:
      x: float[B, T, N, H], queries or keys.
      rotation: of their positions.

    Returns:
      The same shape and dtype as `x`.
    """
    sin, cos = (a[:, :, None] for a in rotation)  # the same for all heads
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Array | None, logits_softcap: float = 0.0
) -> jax.Array:
    """Grouped-query attention: query head `n` reads key/value head `n // G`.

    Args:
      q: float[B, T, N, H], already scaled.
      k: float[B, S, K, H].
      v: float[B, S, K, H].
      mask: bool[B, T, S], 1 = may see; None = all.
      logits_softcap: cap of the logits before masking, 0 = none.

    Returns:
      float[B, T, N, H] in the dtype of `q`. A query that may see nothing gets the mean of `v`.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    # float32 from here to the end of the softmax.
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    logits = softcap(logits, logits_softcap)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, K_MASK)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def remat(body, policy: str | None):
    """The scan body as it is (None), or recomputed in the backward pass by a named policy."""
    if policy is None:
        return body
    # Within a scan the compiler cannot merge the recomputation with the first computation.
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def check_remat_policy(policy: str | None) -> None:
    if policy is not None and policy not in REMAT_POLICIES:
        raise UserError(
            f"remat_policy {policy!r} is unknown: {closest(policy, REMAT_POLICIES)}; "
            "None means no rematerialisation"
        )


class RMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)` over the last dimension; a scale of zero leaves unit RMS."""

    def __init__(self, width: int, *, param_dtype: str):
        self.scale = zeros((width,), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...])


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Gemma's RMSNorm: float32 inside, `(1 + scale)` included, then back to the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last dimension with scale and bias; float32 inside."""

    def __init__(self, width: int, *, param_dtype: str):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = zeros((width,), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(
            jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6
        )
        out = normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return out.astype(x.dtype)


class Adapter(NamedTuple):
    """What is trained beside a frozen weight; see `lora`."""

    a: Array  # float32[*inputs, r]
    b: Array  # float32[r, *outputs]
    scale: float


def adapter(module: nnx.Module, name: str, half: int | None = None) -> Adapter | None:
    """The adapter of a module's weight, or of one half of a pair; None if there is none."""
    a = getattr(module, f"{name}_lora_a", None)
    if a is None:
        return None
    which = ... if half is None else half
    return Adapter(a[which], getattr(module, f"{name}_lora_b")[which], module.lora_scale)


def from_embed(
    x: jax.Array, weight: Array | QArray, *axes: str, adapter: Adapter | None = None
) -> jax.Array:
    """Contracts the model's width with a weight's dimension `embed`.

    Args:
      x: float[..., D].
      weight: a parameter, cast to the dtype of `x`.
      *axes: logical axes of the weight; see `fsdp.matrix`.
      adapter: of the weight, with `inputs` the width.

    Returns:
      float[..., *others], the weight's other dimensions in order.
    """
    others = [size for size, axis in zip(weight.shape, axes, strict=True) if axis != "embed"]
    y = jnp.einsum("...D,DE->...E", x, fsdp.matrix(weight, *axes, dtype=x.dtype))
    if adapter is not None:
        a = fsdp.matrix(adapter.a, "embed", "rank", dtype=x.dtype)
        b = adapter.b.astype(x.dtype).reshape(adapter.b.shape[0], -1)
        low = jnp.einsum("...D,Dr->...r", x, a) * jnp.asarray(adapter.scale, x.dtype)
        y = y + jnp.einsum("...r,rE->...E", low, b)
    return y.reshape(*y.shape[:-1], *others)


def to_embed(
    x: jax.Array, weight: Array | QArray, *axes: str, adapter: Adapter | None = None
) -> jax.Array:
    """The way back: contracts all of a weight's dimensions but `embed`.

    Args:
      x: float[..., *others], the weight's other dimensions in order.
      weight: a parameter, cast to the dtype of `x`.
      *axes: logical axes of the weight; see `fsdp.matrix`.
      adapter: of the weight, with `outputs` the width.

    Returns:
      float[..., D].
    """
    x = x.reshape(*x.shape[: x.ndim - len(axes) + 1], -1)
    y = jnp.einsum("...E,DE->...D", x, fsdp.matrix(weight, *axes, dtype=x.dtype))
    if adapter is not None:
        a = adapter.a.astype(x.dtype).reshape(-1, adapter.a.shape[-1])
        b = fsdp.matrix(adapter.b, "rank", "embed", dtype=x.dtype)
        low = jnp.einsum("...E,Er->...r", x, a) * jnp.asarray(adapter.scale, x.dtype)
        y = y + jnp.einsum("...r,Dr->...D", low, b)
    return checkpoint_name(y, _OUTPUTS)


class Projection(nnx.Module):
    """Contracts the last dimensions of its input with the first of a kernel, and adds a bias.

    Args:
      inputs: the kernel's contracted dimensions, in front.
      outputs: the kernel's other dimensions, and the bias's.
      axes: logical axes of the kernel, as in `sharding.PARAM_AXES`. `embed` is all of the inputs or
        all of the outputs, if it is among them.
      param_dtype: storage dtype.
      rngs: stream `params`.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: tuple[str, ...],
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.axes = axes
        self.kernel = fan_in_init(rngs, (*inputs, *outputs), math.prod(inputs), param_dtype)
        self.bias = zeros(outputs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.kernel[...], self.bias[...].astype(x.dtype)
        if self.axes[0] == "embed":
            return from_embed(x, kernel, *self.axes, adapter=adapter(self, "kernel")) + bias
        if self.axes[-1] == "embed":
            return to_embed(x, kernel, *self.axes) + bias
        return jnp.tensordot(x, kernel.astype(x.dtype), kernel.ndim - bias.ndim) + bias
