"""SGLang's KV pool with page summaries, written wherever K and V are written.

The buffers have the shape of SGLang's own, so any of its prefill backends can read and write them;
on CPUs their heads lie apart in memory (:mod:`sgl_psa.kv_layout`). The summaries belong to the pool
and not to the attention backend, because every write of K passes here while a backend that only
decodes never sees prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sgl_psa_kernels import kv_write

from sgl_psa.backends import check_cache, resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.kv_layout import zeros_heads_first
from sgl_psa.scorers import CacheShape, Scorer
from sgl_psa.summaries import make_summaries
from sglang_psa import compat
from sglang_psa.compat import MHATokenToKVPool

if TYPE_CHECKING:
    from sgl_psa.memory.tiered_cache import TieredCache


class PSAKVPool(MHATokenToKVPool):
    """``MHATokenToKVPool``, indexed by slot, plus the summaries of all its layers.

    Attributes:
        tier: where K and V are when not all of them are in memory, else ``None``.
        kernel_backend: of the kernels that write and read the pool.
        summaries: of every page.
    """

    tier: TieredCache | None = None

    def __init__(self, *args: Any, psa_config: PSAConfig, **kwargs: Any) -> None:
        """
        Args:
            psa_config: the server's settings; the rest goes to SGLang's pool.
        """
        self._psa_config = psa_config
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        super()._create_buffers()
        self._create_summaries()

    def _create_buffers_normal(self) -> None:
        if torch.device(self.device).type != "cpu":
            super()._create_buffers_normal()
            return
        slots = self.size + self.page_size
        self.k_buffer, self.v_buffer = (
            [
                zeros_heads_first(slots, self.head_num, dim, self.store_dtype, self.device)
                for _ in range(self.layer_num)
            ]
            for dim in (self.head_dim, self.v_head_dim)
        )

    def _create_summaries(self) -> CacheShape:
        """Choose the kernels and allocate the summaries of every logical page."""
        slots = self.size + self.page_size
        if slots % self.page_size:
            raise ValueError(f"KV pool of {slots} slots does not divide into pages")
        shape = CacheShape(
            num_layers=self.layer_num,
            num_pages=slots // self.page_size,
            page_size=self.page_size,
            num_kv_heads=self.head_num,
            head_dim=self.head_dim,
            device=torch.device(self.device),
        )
        self.kernel_backend = resolve_backend(self._psa_config.backend, self.device)
        check_cache(self.kernel_backend, self.dtype, self.head_dim)
        self.summaries = make_summaries(self._psa_config, shape, self.kernel_backend)
        self._writes: dict[int, kv_write.PreparedWrite] = {}
        return shape

    @property
    def scorer(self) -> Scorer:
        """The scorer, which holds the summaries of K."""
        return self.summaries.scorer

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        k_cache, v_cache = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        if self.kernel_backend == "cpu":
            self._write_natively(layer_idx, loc, cache_k, cache_v)
        else:
            super()._store_kv_layer(layer_idx, loc, cache_k, cache_v)
        self.summaries.on_write(layer_idx, loc, k_cache, v_cache)

    def _write_natively(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        """Where heads lie apart, which SGLang's own C++ writer does not know."""
        write = self._writes.get(layer_idx)
        if write is not None and write.serves(cache_k, cache_v, loc):
            write(cache_k, cache_v, loc)
            return
        k_cache, v_cache = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        kv_write.kv_write(cache_k, cache_v, k_cache, v_cache, loc, backend="cpu")
        self._writes[layer_idx] = kv_write.PreparedWrite(k_cache, v_cache)

    def write(self, layer: Any, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store new rows of K and V, [N, Hkv, D], at the slots ``loc``, int64 [N].

        ``set_kv_buffer`` does the same, and takes longer to find that there is nothing else to do.

        Raises:
            ValueError: a slot outside of the pool; of kernels in C++.
        """
        if self.kernel_backend == "cpu" and k.dtype == v.dtype == self.dtype == self.store_dtype:
            self._store_kv_layer(layer.layer_id - self.start_layer, loc, k, v)
        else:
            self.set_kv_buffer(layer, compat.KVWriteLoc(loc, None), k, v)

    def decode_buffers(self, layer_id: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """K and V of all slots of a layer, [slots, Hkv, D], for the decode wrapper."""
        if self.kernel_backend == "cpu" and self.layer_transfer_counter is None:
            index = layer_id - self.start_layer
            return self.k_buffer[index], self.v_buffer[index]
        buffers: tuple[torch.Tensor, torch.Tensor] = self.get_kv_buffer(layer_id)
        return buffers

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Move rows; their pages lose their summaries and are attended exactly from then on."""
        super().move_kv_cache(tgt_loc, src_loc)
        self.summaries.invalidate_slots(tgt_loc)

    def load_cpu_copy(
        self, kv_cache_cpu: Any, indices: torch.Tensor, mamba_indices: Any = None
    ) -> None:
        """Restore rows from host memory, in token order, and summarise them."""
        super().load_cpu_copy(kv_cache_cpu, indices, mamba_indices)
        self.summaries.invalidate_slots(indices)
        for layer in range(self.layer_num):
            self.summaries.on_write(layer, indices, self.k_buffer[layer], self.v_buffer[layer])

    def forget_pages(self, pages: torch.Tensor) -> None:
        """Drop the summaries of released pages, int64 [N].

        Whoever fills such a page by a path that bypasses this pool finds it marked as not
        summarised, so the decode loop reads it instead of trusting a former owner's summary.
        """
        self.summaries.invalidate_slots(pages * self.page_size)

    def forget_all(self) -> None:
        """Drop every summary (flush)."""
        self.summaries.invalidate_all()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of K and of V, each with its summaries."""
        k_bytes, v_bytes = super().get_kv_size_bytes()
        summaries = self.summaries
        return k_bytes + summaries.scorer.size_bytes(), v_bytes + summaries.values.size_bytes()

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        del self.summaries, self._writes
