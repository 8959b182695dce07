"""What the tests take for FlashInfer, which has no kernels for CPUs.

It reads memory as ``attention/decode.cuh`` of FlashInfer 0.6.15 does: a row's length is computed in
32 bits without sign, index i begins i strides of a page behind the cache's first element, and what
comes of a row without tokens is no result.
"""

import math
from typing import Any

import torch

#: FlashInfer cuts rows of more tokens, unless they are of one page.
UNCUT_TOKENS = 128


class BatchDecodeWithPagedKVCacheWrapper:
    """The arguments that the backend uses, by FlashInfer's names."""

    plans = 0

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: torch.Tensor,
        paged_kv_indices_buffer: torch.Tensor,
        paged_kv_last_page_len_buffer: torch.Tensor,
    ) -> None:
        assert kv_layout == "HND" and use_cuda_graph
        self.use_tensor_cores = use_tensor_cores
        self.indptr = paged_kv_indptr_buffer
        self.indices = paged_kv_indices_buffer
        self.last_page_len = paged_kv_last_page_len_buffer

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        # Three tables of a number a row at least.
        assert int_workspace_buffer.numel() >= 12 * len(self.last_page_len)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
        disable_split_kv: bool,
    ) -> None:
        type(self).plans += 1
        pages = indptr.diff()
        longest = int(((pages - 1) * page_size + last_page_len).max())
        if self.use_tensor_cores:
            assert disable_split_kv
        else:
            assert not disable_split_kv and num_qo_heads in (1, 2, 3, 4, 8)
            assert longest <= UNCUT_TOKENS or int(pages.max()) == 1
        assert num_kv_heads == 1 and kv_data_type == q_data_type
        for buffer, given in (
            (self.indptr, indptr),
            (self.indices, indices),
            (self.last_page_len, last_page_len),
        ):
            buffer[: len(given)].copy_(given)
        self.shape = (num_qo_heads, head_dim)
        self.page_size, self.scale, self.dtype = page_size, sm_scale, q_data_type

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, ...], *, return_lse: bool
    ) -> Any:
        assert return_lse and q.dtype == self.dtype and q.shape[1:] == self.shape
        k, v = paged_kv_cache
        assert k.stride() == v.stride() and k.shape[1:3] == (1, self.page_size)
        ends = self.indptr.tolist()
        out = torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:2], float("nan"))
        for row, last in enumerate(self.last_page_len.tolist()):
            count = ends[row + 1] - ends[row]
            length = ((count - 1) * self.page_size + last) % 2**32
            assert length <= count * self.page_size
            if length == 0:
                continue
            pages = self.indices[ends[row] : ends[row] + -(-length // self.page_size)]
            keys, values = (read(cache, pages)[:length].float() for cache in (k, v))
            logits = q[row].float() @ keys.T * self.scale
            out[row] = (torch.softmax(logits, 1) @ values).to(q.dtype)
            lse[row] = torch.logsumexp(logits, 1) / math.log(2)
        return out, lse


def read(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Tokens [N, D] of ``pages``, by the strides of the cache."""
    begin = pages.long()[:, None, None] * cache.stride(0)
    token = torch.arange(cache.shape[2])[:, None] * cache.stride(2)
    at = begin + token + torch.arange(cache.shape[3])
    whole = cache.as_strided((int(at.max()) + 1,), (1,))
    return whole[at].flatten(0, 1)
