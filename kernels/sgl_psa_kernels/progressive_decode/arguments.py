"""What a decode step gives to attention beside keys and values, and the checks of it."""

from typing import NamedTuple

import torch

from sgl_psa_kernels import checks


class DecodeArguments(NamedTuple):
    """Arguments of :func:`sgl_psa_kernels.progressive_decode.progressive_decode`, by its names."""

    q: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    log_mass: torch.Tensor | None
    mode: torch.Tensor
    threshold: torch.Tensor
    kappa_floor: torch.Tensor
    kappa_std: torch.Tensor
    sm_scale: float
    sink_pages: int
    recent_pages: int
    group_pages: int
    group_percent: int = 0
    first_pages: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    kappa_start: torch.Tensor | None = None
    residuals: torch.Tensor | None = None

    def check(self, op: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> None:
        """Hold them against pages of that dtype and shape.

        Raises:
            ValueError: naming ``op``, the argument, and what it should be.
        """
        q = self.q
        checks.check_queries(op, q, num_kv_heads, head_dim)
        checks.require(
            q.dtype == dtype, f"{op}: q is {q.dtype}, the keys and values {dtype}; convert q"
        )
        rows = (q.shape[0],)
        checks.check_rows(op, self.page_table, self.seq_lens, q.shape[0])
        pairs, heads, width = (*rows, num_kv_heads), q.shape[:2], self.page_table.shape[1]
        for name, tensor, kind, size in (
            ("mode", self.mode, torch.int32, rows),
            ("threshold", self.threshold, torch.float32, rows),
            ("kappa_floor", self.kappa_floor, torch.float32, rows),
            ("kappa_std", self.kappa_std, torch.float32, rows),
            ("log_mass", self.log_mass, torch.float32, (*heads, width)),
            ("first_pages", self.first_pages, torch.int32, pairs),
            ("attended", self.attended, torch.uint8, (*pairs, width)),
            ("kappa_start", self.kappa_start, torch.float32, heads),
            ("residuals", self.residuals, torch.float32, (*heads, 3)),
        ):
            if tensor is not None:
                checks.check_tensor(op, name, tensor, kind, size)
        checks.require(
            self.sink_pages >= 0 and self.recent_pages >= 0,
            f"{op}: sink_pages and recent_pages must be >= 0, got {self.sink_pages} and "
            f"{self.recent_pages}",
        )
        checks.require(
            self.group_pages >= 1, f"{op}: group_pages must be >= 1, got {self.group_pages}"
        )
        checks.require(
            self.group_percent >= 0, f"{op}: group_percent must be >= 0, got {self.group_percent}"
        )
