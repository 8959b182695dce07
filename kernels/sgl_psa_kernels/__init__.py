"""Operators of progressive sparse attention on paged KV caches.

Every operator is a folder with ``reference.py`` (plain torch, the specification) and ``cpu.py``
(the binding of the C++ kernels in ``_native``). The public function of an operator takes the
implementation by name: ``backend="reference"``, ``"torch"``, ``"cpu"`` or ``"triton"``.

This package knows tensors and pages only; it imports neither ``sgl_psa`` nor ``sglang``.
"""

from sgl_psa_kernels.backend import BACKENDS, choose

__all__ = ["BACKENDS", "choose"]
