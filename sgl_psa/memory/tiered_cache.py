"""K and V of all layers on two tiers: what a KV pool and the decode wrapper talk to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sgl_psa_kernels.page_tier import (
    HostStore,
    PageTier,
    make_tier,
)

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.memory.host_file import HostFile
from sgl_psa.memory.placements import PLACEMENTS, Placement
from sgl_psa.memory.residency import Residency
from sgl_psa.memory.sizes import PoolSizes, pool_sizes, tier_shape

#: Kernel backend -> the tier's.
_BACKENDS = {"cpu": "cpu", "reference": "reference", "triton": "triton"}
#: Bytes a nanosecond that kernels are taken to read over the link to the host: what PCIe 4.0 x16
#: gives. Not measured on the machine; admission only weighs it against the time of a step.
LINK_BYTES_PER_NS = 20


class TieredCache:
    """A page tier with the placement that runs it.

    The host tier has every page that is full; the device tier has the frames that layers use. What
    is attended, and in which order, is the caller's, so results are bit for bit those of a cache
    that holds everything; with an int8 host, of one that rounds every page when it is full.

    Attributes:
        tier, residency, placement: its parts.
        step: number of the newest decode step, from 1 on.
    """

    def __init__(
        self,
        tier: PageTier,
        placement: Placement,
        *,
        pipeline: bool = True,
        host_file: HostFile | None = None,
    ) -> None:
        self.tier = tier
        self.placement = placement
        self.residency = Residency(tier, placement)
        self.pipeline = pipeline
        self.host_kind = "file" if host_file else "memory"
        self.step = 0
        self._host_file = host_file
        self._staging: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def build(
        cls,
        config: PSAConfig,
        *,
        num_layers: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        backend: str,
        device: torch.device | str = "cpu",
    ) -> TieredCache:
        """The cache that ``config`` asks for.

        Args:
            num_kv_heads: of this tensor-parallel rank.
            backend: kernel backend, from :func:`sgl_psa.backends.resolve_backend`.
            device: where frames lie, that of the kernels. On a CUDA device the host tier is memory
                that is pinned as a whole.

        Raises:
            ConfigError: a tier cannot hold the least that one request needs, the host file cannot
                be made, or the kernels have no tiers, or none over a file.
            HostStoreError: the host tier's memory cannot be pinned.
        """
        if backend not in _BACKENDS:
            raise ConfigError(
                f"device_pool_bytes={config.device_pool_bytes}: kernels {backend!r} have no tiers; "
                f"set backend to {' or '.join(_BACKENDS)}, or drop device_pool_bytes and "
                "host_pool_bytes"
            )
        if backend == "triton" and config.host_path:
            raise ConfigError(
                f"host_path={config.host_path!r}: Triton kernels read the host tier where it lies, "
                "which must be memory; drop host_path"
            )
        device = torch.device(device)
        shape = tier_shape(
            config.host_dtype,
            num_layers=num_layers,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        sizes = pool_sizes(config, shape)
        shape = shape._replace(num_pages=sizes.num_pages, num_frames=sizes.num_frames)
        placement = PLACEMENTS[config.placement](shape)
        host_file = HostFile(config.host_path, shape.host_bytes) if config.host_path else None
        if host_file is not None:
            host = HostStore.file(host_file.fd, shape.host_bytes)
        else:
            host = _memory(shape.host_bytes)
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            tier = make_tier(shape, host, backend=_BACKENDS[backend], pipeline=config.pipeline)
        return cls(tier, placement, pipeline=config.pipeline, host_file=host_file)

    @property
    def sizes(self) -> PoolSizes:
        """What the tiers hold."""
        shape = self.tier.shape
        return PoolSizes(
            shape.num_layers,
            shape.num_frames,
            shape.num_pages,
            shape.page_size,
            shape.frame_bytes,
            shape.record_bytes,
        )

    def begin_step(self) -> None:
        """A decode step begins; before the first layer's ``decode``."""
        self.step += 1
        self.residency.begin_step(self.step)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store rows of new tokens.

        Args:
            slots: int64 [N], in the order of the tokens; a page fills from its first slot on.
            k, v: [N, Hkv, D].

        Raises:
            HostStoreError: the host tier failed; the cache is of no use any more.
        """
        self.tier.write(layer, slots, k, v)

    def decode(
        self, layer: int, q: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention of the open step in one layer: out [B, Hq, D], lse [B, Hq] and statistics.

        Args:
            arguments: those of :func:`sgl_psa_kernels.progressive_decode.progressive_decode` by
                name, without caches, page size and backend; ``stats`` float32 [B, Hkv, 6] is
                written if given.

        Raises:
            HostStoreError: the host tier failed; the cache is of no use any more.
            RuntimeError: a page's tokens are on neither tier.
        """
        return self.tier.decode(layer, self.step, q, **arguments)

    def read(
        self, layer: int, pages: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [tokens, Hkv, D] of the first ``tokens`` tokens of ``pages``, int64 [n]; new
        tensors on the frames' device."""
        k, v = self._rows(tokens)
        if tokens:
            self.tier.gather(layer, pages, tokens, k, v)
        return k, v

    def reserve(self, tokens: int) -> None:
        """Have one buffer for K and V of so many tokens, through which prefixes are read."""
        if self._staging is None or len(self._staging[0]) < tokens:
            # The old one goes first: there is room for one.
            self._staging = None
            self._staging = self._rows(tokens)

    def prefix_and_rows(
        self, layer: int, pages: torch.Tensor, tokens: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a whole prefix with those of new tokens behind it, in the buffer of
        :meth:`reserve`; gone with the next call.

        Args:
            pages: int64 [n], those of the prefix in order.
            tokens: length of the prefix.
            k, v: [N, Hkv, D], of the new tokens.

        Returns:
            k and v [tokens + N, Hkv, D], contiguous.
        """
        end = tokens + len(k)
        k_all, v_all = self._staged(end)
        self.tier.gather(layer, pages, tokens, k_all[:tokens], v_all[:tokens])
        k_all[tokens:], v_all[tokens:] = k, v
        return k_all, v_all

    def prefix_blocks(
        self, layer: int, pages: torch.Tensor, tokens: int, block_tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of a prefix, block by block, through one buffer: a block is gone when the next
        one is asked for.

        Args:
            pages: int64 [n], those of the prefix in order.
            tokens: length of the prefix.
            block_tokens: tokens of a block, a multiple of the page size; the last may be shorter.

        Yields:
            k and v [block, Hkv, D], contiguous.

        Raises:
            ValueError: blocks that do not consist of whole pages.
        """
        shape = self.tier.shape
        if block_tokens % shape.page_size:
            raise ValueError(
                f"prefix_blocks: {block_tokens} tokens are not whole pages of {shape.page_size}"
            )
        k_buffer, v_buffer = self._staged(min(tokens, block_tokens))
        for start in range(0, tokens, block_tokens):
            length = min(block_tokens, tokens - start)
            first = start // shape.page_size
            last = first - (-length // shape.page_size)
            k, v = k_buffer[:length], v_buffer[:length]
            self.tier.gather(layer, pages[first:last], length, k, v)
            yield k, v

    def _staged(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows of the buffer."""
        self.reserve(tokens)
        assert self._staging is not None
        k, v = self._staging
        return k[:tokens], v[:tokens]

    def _rows(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for K and V of tokens."""
        shape = self.tier.shape
        size = (tokens, shape.num_kv_heads, shape.head_dim)
        k = torch.empty(size, dtype=shape.dtype, device=self.tier.k_frames.device)
        return k, torch.empty_like(k)

    def release(self, pages: torch.Tensor) -> None:
        """Forget logical pages, int64 [n], in all layers."""
        self.tier.release(pages)

    def clear(self) -> None:
        """Forget everything (flush)."""
        self.tier.clear()

    def working_set(self, pages: torch.Tensor) -> int:
        """Frames that logical pages (int64 [n]) need now: see ``Residency.working_set``."""
        return self.residency.working_set(pages)

    def waited_ns(self) -> int:
        """Nanoseconds of one core that decode has waited for pages since start. On a CUDA device,
        where attention reads pages without frame over the link, the time that the link takes."""
        counters = self.tier.counters()
        through = counters.bytes_read_through // LINK_BYTES_PER_NS
        return through + counters.stall_ns // torch.get_num_threads()

    def snapshot(self) -> dict[str, Any]:
        """The JSON of ``memory`` in ``GET /psa/stats``; totals are since start.

        ``hit_rate`` is of pages attended by (row, KV head) pairs, of which ``misses`` had no frame,
        and 1 before the first; ``stall_ms`` core time in which decode only waited; ``history``
        samples of the whole run.
        """
        sizes, counters, residency = self.sizes, self.tier.counters(), self.residency
        shape = self.tier.shape
        frames = residency.frames_by_layer().tolist()
        working = residency.working_set_by_layer()
        misses = self.tier.misses(counters)
        attended = counters.hits + misses
        return {
            "placement": self.placement.name,
            "pipeline": self.pipeline,
            "host_kind": self.host_kind,
            "host_dtype": str(shape.host_dtype or shape.dtype).removeprefix("torch."),
            "step": self.step,
            "frame_bytes": sizes.frame_bytes,
            "record_bytes": sizes.record_bytes,
            "num_frames": sizes.num_frames,
            "num_pages": sizes.num_pages,
            "device_bytes": sizes.device_bytes,
            "host_bytes": sizes.host_bytes,
            "frames_used": sum(frames),
            "frames_by_layer": frames,
            "working_set_frames": sum(working),
            "working_set_bytes": sum(working) * sizes.frame_bytes,
            "working_set_by_layer": working,
            "misses": misses,
            "hit_rate": counters.hits / attended if attended else 1.0,
            "stall_ms": counters.stall_ns / 1e6,
            **{name: value for name, value in counters._asdict().items() if name != "stall_ns"},
            "orders": residency.orders,
            "order_ms": residency.order_ns / 1e6,
            "history": {
                "steps": [sample.step for sample in residency.samples],
                "frames": [list(sample.frames) for sample in residency.samples],
            },
        }

    def check(self) -> list[str]:
        """What contradicts itself; an empty list if nothing does. For a cache that is idle."""
        return self.tier.check()

    def close(self) -> None:
        """End the copy thread and give the host tier back."""
        self.tier.close()
        if self._host_file is not None:
            self._host_file.close()


def _memory(num_bytes: int) -> HostStore:
    try:
        return HostStore.memory(num_bytes)
    except OSError as error:
        raise ConfigError(
            f"host_pool_bytes={num_bytes}: the system does not give as much memory "
            f"({error.strerror}); set host_pool_bytes lower, or host_path to a folder on disk"
        ) from None
