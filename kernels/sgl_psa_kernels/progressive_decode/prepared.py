"""Progressive decode by the C++ kernels with arguments that stay between layers and steps."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, require_cpu, rows


class PreparedDecode:
    """:func:`sgl_psa_kernels.progressive_decode.progressive_decode` of batches of so many rows.

    Nothing is checked here: make it with what the checked operator has just run with.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        mode: torch.Tensor,
        threshold: torch.Tensor,
        kappa_floor: torch.Tensor,
        kappa_std: torch.Tensor,
        *,
        page_size: int,
        sink_pages: int,
        recent_pages: int,
        group_pages: int,
        group_percent: int = 0,
    ) -> None:
        op = "progressive_decode"
        require_cpu(op, q, k_cache, v_cache, page_table, seq_lens, mode, threshold)
        self._like = _like(q, k_cache, v_cache)
        self._lse = q.shape[:2]
        args = abi.DecodeArgs(
            rows=rows(
                op,
                q,
                page_table,
                seq_lens,
                num_kv_heads=k_cache.shape[1],
                num_pages=k_cache.shape[0] // page_size,
                page_size=page_size,
                sm_scale=0.0,
            ),
            sink_pages=sink_pages,
            recent_pages=recent_pages,
            group_pages=group_pages,
            group_percent=group_percent,
            k_token_stride=k_cache.stride(0),
            k_head_stride=k_cache.stride(1),
            v_token_stride=v_cache.stride(0),
            v_head_stride=v_cache.stride(1),
        )
        self._call = PreparedCall(op, "psa_progressive_decode", args)
        self._point_to(page_table, seq_lens, mode, threshold, kappa_floor, kappa_std)

    def take_batch(self, **batch: torch.Tensor) -> None:
        """Go on with other rows.

        Args:
            batch: page table, lengths and rules, as they were given to make this; they may differ
                in ``max_pages``, and have the dtypes of those.

        Raises:
            ValueError: there are fewer or more rows, or they are not contiguous.
        """
        count = self._lse[0]
        if any(len(t) != count or not t.is_contiguous() for t in batch.values()):
            raise ValueError(f"progressive_decode: need contiguous tensors of {count} rows")
        self._point_to(**batch)

    def _point_to(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        mode: torch.Tensor,
        threshold: torch.Tensor,
        kappa_floor: torch.Tensor,
        kappa_std: torch.Tensor,
    ) -> None:
        self._keep = (page_table, seq_lens, mode, threshold, kappa_floor, kappa_std)
        args = self._call.args
        args.rows.max_pages = page_table.shape[1]
        args.rows.page_table_stride = page_table.stride(0)
        args.rows.page_table = page_table.data_ptr()
        args.rows.seq_lens = seq_lens.data_ptr()
        args.mode = mode.data_ptr()
        args.threshold = threshold.data_ptr()
        args.kappa_floor = kappa_floor.data_ptr()
        args.kappa_std = kappa_std.data_ptr()

    def serves(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Whether these have the shapes, strides and dtypes of those that it was made with; the
        strides of rows and heads of ``q`` may differ."""
        return self._like == _like(q, k_cache, v_cache)

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        log_mass: torch.Tensor | None,
        stats: torch.Tensor,
        layer: int,
        *,
        sm_scale: float,
        first_pages: torch.Tensor | None = None,
        attended: torch.Tensor | None = None,
        kappa_start: torch.Tensor | None = None,
        residuals: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``out`` and ``lse``; statistics go to ``stats[layer]``, float32 [L, B, Hkv, 6].

        Raises:
            ValueError: a row with rule but no ``log_mass``, a page outside of the pool.
        """
        out = q.new_empty(q.shape)
        lse = q.new_empty(self._lse, dtype=torch.float32)
        args = self._call.args
        args.rows.q = q.data_ptr()
        args.rows.q_row_stride, args.rows.q_head_stride, _ = q.stride()
        args.rows.sm_scale = sm_scale
        args.k = k_cache.data_ptr()
        args.v = v_cache.data_ptr()
        args.log_mass = None if log_mass is None else log_mass.data_ptr()
        args.out = out.data_ptr()
        args.lse = lse.data_ptr()
        args.stats = stats.data_ptr() + layer * stats.stride(0) * 4
        args.first_pages = None if first_pages is None else first_pages.data_ptr()
        args.attended = None if attended is None else attended.data_ptr()
        args.kappa_start = None if kappa_start is None else kappa_start.data_ptr()
        args.residuals = None if residuals is None else residuals.data_ptr()
        self._call()
        return out, lse


def _like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[object, ...]:
    return (
        q.shape,
        q.dtype,
        q.stride(2),
        k.shape,
        k.stride(),
        k.dtype,
        v.shape,
        v.stride(),
        v.dtype,
    )
