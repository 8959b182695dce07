"""Key sketches by the C++ kernels with arguments that are checked once and used for every layer.

At short contexts checking and building them again in every layer takes longer than the kernels.
"""

from collections.abc import Sequence

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, dtype_code, require_cpu, rows

#: Name of a pointer in the arguments, its value for layer 0, and bytes from layer to layer.
_Places = list[tuple[str, int, int]]


def _places(**tensors: torch.Tensor) -> _Places:
    return [
        (name, tensor.data_ptr(), tensor.stride(0) * tensor.element_size())
        for name, tensor in tensors.items()
    ]


class PreparedWrite:
    """:func:`sgl_psa_kernels.key_sketch.write` into pools of several layers, one or two sketches of
    each key, and the watermarks with them: checked once, so that a token costs little.

    Codes and affine values are those of all layers, [L, ...]; ``watermark`` int32 [L, num_pages]
    moves slot by slot: a slot counts if it is a page's first or not beyond the watermark.
    """

    def __init__(
        self,
        k_cache: torch.Tensor,
        sketches: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
        watermark: torch.Tensor,
        signs: torch.Tensor | None,
        *,
        page_size: int,
        in_order: bool = False,
    ) -> None:
        """
        Args:
            k_cache: one layer's; the others have its shape, strides and dtype.
            sketches: bits, codes and affine of each, at most two; all with ``signs`` or none.
            in_order: as for :func:`sgl_psa_kernels.key_sketch.write`; then calls may differ in N.

        Raises:
            ValueError: the cache or its dtype does not suit the kernels.
            RuntimeError: no usable native library.
        """
        op = "key_sketch.write"
        checks.check_cache(op, "k_cache", k_cache, 1 if in_order else page_size)
        num_slots = watermark.shape[1] * page_size
        checks.require(
            in_order or k_cache.shape[0] == num_slots,
            f"{op}: k_cache has {k_cache.shape[0]} slots, the watermarks {num_slots}",
        )
        require_cpu(op, k_cache, watermark, signs, *(t for s in sketches for t in s[1:]))
        self._in_order = in_order
        self._like = self._kind(k_cache)
        self._keep = (sketches, watermark, signs)
        bits, codes, affine = sketches[0]
        self._places = _places(codes=codes, affine=affine, watermark=watermark)
        if len(sketches) == 2:
            _, codes, affine = sketches[1]
            self._places += _places(second_codes=codes, second_affine=affine)
        args = abi.SketchWriteArgs(
            num_kv_heads=k_cache.shape[1],
            head_dim=k_cache.shape[2],
            page_size=page_size,
            dtype=dtype_code(op, k_cache),
            bits=bits,
            num_slots=num_slots,
            k_token_stride=k_cache.stride(0),
            k_head_stride=k_cache.stride(1),
            signs=None if signs is None else signs.data_ptr(),
            second_bits=sketches[-1][0],
            in_order=in_order,
        )
        self._args = args
        self._calls: dict[int, PreparedCall] = {}

    def serves(self, k_cache: torch.Tensor, in_order: bool = False) -> bool:
        """Whether it was made for such a cache, or such keys."""
        return self._in_order == in_order and self._like == self._kind(k_cache)

    def _kind(self, k_cache: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
        shape = k_cache.shape[1:] if self._in_order else k_cache.shape
        return shape, k_cache.stride(), k_cache.dtype

    def __call__(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        """Sketch the keys at ``slots``, int64 [N]."""
        count = len(k_cache) if self._in_order else None
        checks.check_tensor("key_sketch.write", "slots", slots, torch.int64, (count,))
        call = self._calls.get(layer)
        if call is None:
            call = self._calls[layer] = self._of_layer(layer)
        args = call.args
        args.k = k_cache.data_ptr()
        args.slots = slots.data_ptr()
        args.count = slots.shape[0]
        call()

    def _of_layer(self, layer: int) -> PreparedCall:
        args = abi.SketchWriteArgs.from_buffer_copy(self._args)
        for field, base, stride in self._places:
            setattr(args, field, base + layer * stride)
        return PreparedCall("key_sketch.write", "psa_sketch_write", args)


class PreparedScore:
    """:func:`sgl_psa_kernels.key_sketch.score` of one batch in any layer, checked once.

    Codes, affine values and watermarks are those of all layers, [L, ...]. With ``signs`` queries
    come as they are and are rotated by the kernel.
    """

    def __init__(
        self,
        q: torch.Tensor,
        codes: torch.Tensor,
        affine: torch.Tensor,
        watermark: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        active: torch.Tensor,
        candidates: torch.Tensor | None,
        signs: torch.Tensor | None,
        *,
        bits: int,
        page_size: int,
    ) -> None:
        """Made by :func:`sgl_psa_kernels.key_sketch.prepare_score`, which checks the arguments."""
        op = "key_sketch.score"
        require_cpu(op, q, codes, affine, watermark, page_table, seq_lens, active, candidates)
        self._keep = (codes, affine, watermark, page_table, seq_lens, active, candidates, signs)
        self._places = _places(codes=codes, affine=affine, watermark=watermark)
        args = abi.SketchScoreArgs(
            rows=rows(
                op,
                q,
                page_table,
                seq_lens,
                num_kv_heads=codes.shape[2],
                num_pages=codes.shape[1],
                page_size=page_size,
                sm_scale=0.0,
            ),
            bits=bits,
            affine_width=affine.shape[4],
            active=active.data_ptr(),
            candidates=None if candidates is None else candidates.data_ptr(),
            signs=None if signs is None else signs.data_ptr(),
        )
        self._call = PreparedCall(op, "psa_sketch_score", args)

    def __call__(
        self, layer: int, q: torch.Tensor, log_mass: torch.Tensor, sm_scale: float
    ) -> None:
        """Write ``log_mass`` float32 [B, Hq, max_pages]; ``q`` has the shape and dtype of the one
        that the call was prepared with."""
        args = self._call.args
        rows = args.rows
        rows.q = q.data_ptr()
        rows.q_row_stride, rows.q_head_stride, _ = q.stride()
        rows.sm_scale = sm_scale
        for field, base, stride in self._places:
            setattr(args, field, base + layer * stride)
        args.log_mass = log_mass.data_ptr()
        self._call()
