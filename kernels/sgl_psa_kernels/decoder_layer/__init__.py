"""A decoder layer of Llama's kind over one token a request, attention given.

Norm, q, k and v, rotary embedding, attention, projection, norm, gated MLP: the operators of this
package one after the other, with nothing but calls between them. Around the few rows of a decode
step the host's work for a call outweighs that of many kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from sgl_psa_kernels import checks
from sgl_psa_kernels._native.abi import SKINNY_ROWS as MAX_ROWS
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.decoder_layer import cpu, reference
from sgl_psa_kernels.decoder_layer.parts import (
    OP,
    Attend,
    LayerMemory,
    LayerSettings,
    LayerSizes,
    LayerWeights,
)

Layer = reference.ReferenceLayer | cpu.NativeLayer

_IMPLEMENTATIONS: dict[str, Callable[[LayerWeights, LayerSettings, LayerMemory], Layer]] = {
    "reference": reference.ReferenceLayer,
    "cpu": cpu.NativeLayer,
}


def make_layer(
    weights: LayerWeights, settings: LayerSettings, memory: LayerMemory, *, backend: str
) -> Layer:
    """A layer for as many tokens as ``memory`` has rows.

    Its call takes positions (int64 [M], contiguous), the hidden state and the residual stream ([M,
    C], contiguous, of the weights' dtype; no residual before the first layer) and what attends. It
    returns hidden state and residual stream for the next layer, which lie in ``memory``. Tensors
    are not checked again. Results are those of the operators called for themselves, bit for bit.

    Args:
        weights: are read where they lie at every call.
        memory: of ``LayerSizes.of(weights, settings, rows)``, 1 to ``MAX_ROWS`` rows; layers that
            are called one after the other may share it.
        backend: "reference" or "cpu" (C++).

    Raises:
        ValueError: unknown backend, or weights, settings and memory that do not belong together;
            from a call: a position outside of ``cos_sin``.
        RuntimeError: backend "cpu" without a usable native library.
    """
    weights.check(settings)
    want = LayerSizes.of(weights, settings, memory.sizes.rows)
    checks.require(
        want == memory.sizes, f"{OP}: the memory is for {memory.sizes}, these weights need {want}"
    )
    return choose(backend, _IMPLEMENTATIONS, OP)(weights, settings, memory)


__all__ = [
    "MAX_ROWS",
    "Attend",
    "Layer",
    "LayerMemory",
    "LayerSettings",
    "LayerSizes",
    "LayerWeights",
    "make_layer",
]
