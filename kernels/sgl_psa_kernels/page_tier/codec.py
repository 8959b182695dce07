"""Records of an int8 host tier: int8 elements under shared powers of two, in plain torch.

The format is that of microscaling (OCP Microscaling Formats 1.0, MXINT8) with blocks after KIVI
(arXiv 2402.02750): keys share an exponent per channel of a page, values one per token. An element
q of exponent e stands for q * 2^e, which bfloat16, float16 and float32 hold exactly; so a page that
was rounded once rounds to itself, and to the same record.
"""

import math
from typing import NamedTuple

import torch

from sgl_psa_kernels.page_tier.shape import TierShape

#: Largest element; -128 is not used.
LARGEST = 127

#: Exponent of a block that held an infinity or a NaN. All of it is NaN when it comes back.
NOT_FINITE = -128


class ExponentRange(NamedTuple):
    """Exponents of a dtype: ``lowest``, of whose power all that is smaller may be rounded to a
    multiple, and ``highest``, up to which all elements are finite; beyond it they saturate."""

    lowest: int
    highest: int


#: All float16 values are multiples of 2^-24. Under 2^-119 no product is subnormal in bfloat16 and
#: float32, and nothing depends on whether the machine flushes those.
EXPONENTS = {
    torch.float16: ExponentRange(-24, 9),
    torch.bfloat16: ExponentRange(-119, 121),
    torch.float32: ExponentRange(-119, 121),
}


def quantise(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks along ``dim`` as elements and exponents.

    The exponent is the smallest within the dtype's range under which the largest magnitude rounds
    (half to even) to 127 at most.

    Args:
        x: bfloat16, float16 or float32.

    Returns:
        elements, int8 of x's shape, and exponents, int8 of x's shape without ``dim``.
    """
    low, high = EXPONENTS[x.dtype]
    largest = x.float().abs().amax(dim)
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), so that 128 times it is to be rounded
    e = exponent - 7 + (mantissa * 128 >= LARGEST + 0.5).int()
    e = torch.where(largest > 0, e.clamp(low, high), low)
    finite = largest.isfinite()
    e = torch.where(finite, e, NOT_FINITE)
    scaled = x.float() * _power(torch.where(finite, -e, 0)).unsqueeze(dim)
    scaled = torch.where(finite.unsqueeze(dim), scaled, 0.0)
    return scaled.round().clamp(-LARGEST, LARGEST).to(torch.int8), e.to(torch.int8)


def dequantise(
    elements: torch.Tensor, exponents: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """What :func:`quantise` made, exactly, or NaN; in ``dtype``."""
    finite = exponents != NOT_FINITE
    power = torch.where(finite, _power(torch.where(finite, exponents, 0).int()), float("nan"))
    return (elements.float() * power.unsqueeze(dim)).to(dtype)


def _power(e: torch.Tensor) -> torch.Tensor:
    """2^e in float32, e int32 in -126..127."""
    return ((e + 127) << 23).int().view(torch.float32)


def encode(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The record of a full page.

    Args:
        k, v: [Hkv, page_size, D].

    Returns:
        uint8 [bytes]: the keys' elements, the values', the keys' exponents [Hkv, D], the values'
        [Hkv, page_size], and zeros up to a multiple of 64 bytes.
    """
    keys, key_exponents = quantise(k, 1)
    values, value_exponents = quantise(v, 2)
    parts = torch.cat([part.flatten() for part in (keys, values, key_exponents, value_exponents)])
    return torch.nn.functional.pad(parts, (0, -len(parts) % 64)).view(torch.uint8)


def decode(record: torch.Tensor, shape: TierShape) -> torch.Tensor:
    """Keys and values [2, Hkv, page_size, D] of a record, in the tier's dtype."""
    heads, size, dim = shape.page_shape
    half = math.prod(shape.page_shape)
    parts = record.view(torch.int8)[: 2 * half + heads * (dim + size)]
    k, v, key_exponents, value_exponents = parts.split([half, half, heads * dim, heads * size])
    keys = dequantise(k.view(shape.page_shape), key_exponents.view(heads, dim), 1, shape.dtype)
    values = dequantise(v.view(shape.page_shape), value_exponents.view(heads, size), 2, shape.dtype)
    return torch.stack([keys, values])
