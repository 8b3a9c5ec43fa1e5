"""FLOPs of the matrix products in a compiled program: two per multiply-add."""

from __future__ import annotations

import functools
import math
import re

from deevisum_jax.planner.instructions import Computation, Instruction


def flops(one: Instruction, within: Computation) -> int:
    """Of a `convolution` or a `dot`; of a Pallas kernel what its author says; else 0.

    TPUs know no matrix product but the convolution. Products with padding, between or around the
    numbers, do not count: the compiler makes a batch of products one convolution with such zeros.

    Raises:
      ValueError: its attributes are none that are known here.
    """
    try:
        if one.opcode == "convolution":
            return _convolution_flops(one, within)
        if one.opcode == "dot":
            return _dot_flops(one, within)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{one.opcode} {one.name}: {error!r}") from error
    if one.opcode == "custom-call":
        found = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', one.rest)
        return int(found[1]) if found else 0
    return 0


def _dot_flops(one: Instruction, within: Computation) -> int:
    left = within[one.operands[0]].arrays[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    sizes = [left.dims[int(dim)] for dim in contracted[1].split(",") if dim] if contracted else []
    return 2 * math.prod(one.arrays[0].dims) * math.prod(sizes)


def _convolution_flops(one: Instruction, within: Computation) -> int:
    inputs, kernel = (within[name].arrays[0].dims for name in one.operands[:2])
    output = one.arrays[0].dims
    in_labels, kernel_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest
    ).groups()
    found = re.search(r"window=\{([^}]*)\}", one.rest)
    window = dict(part.split("=") for part in found[1].split()) if found else {}
    # Groups, of features or of the batch, are in these already: the kernel has the input features
    # of one group only, and in the output the batch is that of one group.
    products = output[out_labels.index("b")] * output[out_labels.index("f")]
    products *= kernel[kernel_labels.index("i")]
    for number in range(len(output) - 2):
        label = str(number)
        products *= _pairs(
            size_in=inputs[in_labels.index(label)],
            size_out=output[out_labels.index(label)],
            size=kernel[kernel_labels.index(label)],
            stride=_window(window, "stride", number, "1"),
            pad=_window(window, "pad", number, "0_0"),
            in_dilation=_window(window, "lhs_dilate", number, "1"),
            kernel_dilation=_window(window, "rhs_dilate", number, "1"),
        )
    return 2 * products


def _window(given: dict[str, str], field: str, dim: int, default: str) -> int:
    """Of one dimension; of a padding its low end."""
    return int((given[field].split("x")[dim] if field in given else default).split("_")[0])


@functools.cache
def _pairs(
    *,
    size_in: int,
    size_out: int,
    size: int,
    stride: int,
    pad: int,
    in_dilation: int,
    kernel_dilation: int,
) -> int:
    """Pairs of a place in the output and one in the kernel that meet a number, not padding."""
    last = (size_in - 1) * in_dilation
    places = (o * stride + k * kernel_dilation - pad for k in range(size) for o in range(size_out))
    return sum(0 <= place <= last and place % in_dilation == 0 for place in places)
