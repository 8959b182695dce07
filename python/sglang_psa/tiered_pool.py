"""SGLang's KV pool where K and V live on two tiers: SGLang counts logical pages, and no buffer
holds all of them.

The logical pages are those of the host tier. Allocator, radix tree and scheduler see a pool of
that size and need to know no more. Summaries of every page stay in memory, written from the new
rows themselves, because the page that they belong to may be away.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NoReturn

import torch

from sgl_psa.memory.sizes import tier_shape
from sgl_psa.memory.tiered_cache import TieredCache
from sglang_psa.kv_pool import PSAKVPool


class NotResident(RuntimeError):
    """Somebody asked for a buffer of all of K or V, which two tiers do not have."""


class PSATieredKVPool(PSAKVPool):
    """``PSAKVPool`` whose rows are written to and read from a :class:`TieredCache`."""

    tier: TieredCache

    def _create_buffers(self) -> None:
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []
        self.k_scale_buffer = self.v_scale_buffer = self.dq_k_buffer = self.dq_v_buffer = None
        shape = self._create_summaries()
        # --max-total-tokens may ask for fewer pages than the host tier has bytes for.
        kv: dict[str, Any] = {
            "num_layers": self.layer_num,
            "page_size": self.page_size,
            "num_kv_heads": self.head_num,
            "head_dim": self.head_dim,
            "dtype": self.store_dtype,
        }
        page = tier_shape(self._psa_config.host_dtype, **kv)
        records = self.layer_num * shape.num_pages
        host = records * page.record_bytes
        device = min(self._psa_config.device_pool_bytes, records * page.frame_bytes)
        self.tier = TieredCache.build(
            dataclasses.replace(self._psa_config, host_pool_bytes=host, device_pool_bytes=device),
            **kv,
            backend=self.kernel_backend,
            device=self.device,
        )
        weakref.finalize(self, self.tier.close)

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        self.tier.write(layer_idx, loc, cache_k, cache_v)
        self.summaries.on_rows(layer_idx, loc, cache_k)

    def decode_buffers(self, layer_id: int) -> tuple[None, None]:
        """None: the wrapper reads from the tier."""
        return None, None

    def _get_key_buffer(self, layer_id: int) -> NoReturn:
        raise NotResident(
            f"layer {layer_id}: K and V are on two tiers (--psa-device-pool-bytes), so there is no "
            "buffer of all of them; drop --psa-device-pool-bytes and --psa-host-pool-bytes, or "
            "what reads the KV cache beside attention"
        )

    _get_value_buffer = _get_key_buffer

    def get_contiguous_buf_infos(self) -> NoReturn:
        """
        Raises:
            NotResident: always.
        """
        self._get_key_buffer(self.start_layer)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """
        Raises:
            NotResident: always; speculative decoding, which moves rows, is refused.
        """
        self._get_key_buffer(self.start_layer)

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None) -> Any:
        """K and V [N, Hkv, D] of each layer, on the CPU.

        Args:
            indices: slots of a request's first N tokens.
        """
        pages = torch.div(indices[:: self.page_size].long(), self.page_size, rounding_mode="floor")
        rows = (self.tier.read(layer, pages, len(indices)) for layer in range(self.layer_num))
        return [(k.cpu(), v.cpu()) for k, v in rows]

    def load_cpu_copy(
        self, kv_cache_cpu: Any, indices: torch.Tensor, mamba_indices: Any = None
    ) -> None:
        """Restore what :meth:`get_cpu_copy` gave to the slots of a request's first N tokens."""
        self.summaries.invalidate_slots(indices)
        for layer, (k, v) in enumerate(kv_cache_cpu):
            self._store_kv_layer(layer, indices.long(), k.to(self.device), v.to(self.device))

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        self.tier.close()

    def forget_pages(self, pages: torch.Tensor) -> None:
        """Drop released pages, integers [N], from both tiers."""
        super().forget_pages(pages)
        self.tier.release(pages.long())

    def forget_all(self) -> None:
        """Drop every page (flush)."""
        super().forget_all()
        self.tier.clear()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of memory for K and for V: their halves of the device tier, and the summaries."""
        half = self.tier.sizes.device_bytes // 2
        summaries = self.summaries
        return half + summaries.scorer.size_bytes(), half + summaries.values.size_bytes()
