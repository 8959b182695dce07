"""The page tier in C++: a copy thread, and attention that goes on while pages are loaded."""

import ctypes
import weakref

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import dtype_code, raise_status, require_cpu, rows
from sgl_psa_kernels._native.loader import load
from sgl_psa_kernels.page_tier.host_store import HostStore, failure
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape
from sgl_psa_kernels.page_tier.tier import OP, PageTier, no_frame
from sgl_psa_kernels.progressive_decode.arguments import DecodeArguments
from sgl_psa_kernels.progressive_decode.modes import NUM_STATS

_PROBLEMS = {
    1: "frames are pinned, awaited or being copied",
    2: "saves are queued",
    4: "the free list is not that of the frames without owner",
    8: "frames of layers are miscounted",
    16: "frames are neither free nor ready",
}


class NativeTier(PageTier):
    """See :class:`PageTier`. Its threads belong to the process that made it."""

    def __init__(self, shape: TierShape, host: HostStore, pipeline: bool) -> None:
        super().__init__(shape, host)
        self._library = load()
        args = abi.TierCreateArgs(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=shape.page_size,
            dtype=dtype_code(OP, self.k_frames),
            itemsize=shape.dtype.itemsize,
            int8_host=shape.int8_host,
            pipeline=pipeline,
            host_fd=host.fd,
            num_pages=shape.num_pages,
            num_frames=shape.num_frames,
            record_bytes=shape.record_bytes,
            host=host.pointer or None,
            k_frames=self.k_frames.data_ptr(),
            v_frames=self.v_frames.data_ptr(),
            **{name: table.data_ptr() for name, table in self.tables._asdict().items()},
        )
        self._call("psa_tier_create", args)
        self._handle: int | None = args.tier
        self._totals = TierCounters(*[0] * 8)
        self._batch: tuple[torch.Tensor, ...] = ()
        self._shape_of_q = torch.Size()
        self._decode_args = abi.TierDecodeArgs()
        # Whatever the threads use lives until they are stopped.
        keep = (host, self.tables, self.k_frames, self.v_frames)
        self._stop = weakref.finalize(self, _destroy, self._library, args.tier, keep)

    def _call(self, function: str, args: ctypes.Structure) -> None:
        status = getattr(self._library, function)(ctypes.byref(args))
        if status:
            self._raise(status, args)

    def _raise(self, status: int, args: ctypes.Structure) -> None:
        error: abi.TierError = args.error
        if status == abi.HOST_STORE:
            verb = "writing" if error.writing else "reading"
            raise failure(verb, error.offset, error.bytes, error.code)
        if status == abi.SHORT_PAGE:
            raise RuntimeError(
                f"{OP}: page {error.page} of layer {error.layer} holds {error.have} tokens, "
                f"{error.want} are asked for"
            )
        if status == abi.NO_FRAME:
            raise RuntimeError(no_frame(error.layer, error.have))
        if status in (abi.GAP, abi.BAD_SLOT):
            slot = ctypes.cast(args.index, ctypes.POINTER(ctypes.c_int64))[error.index]
            if status == abi.BAD_SLOT:
                raise ValueError(f"{OP}: slots[{error.index}] = {slot} lies outside of the tier")
            raise ValueError(
                f"{OP}: slots[{error.index}] = {slot} is token {error.want} of page {error.page}, "
                f"which holds {error.have}"
            )
        raise_status(OP, status, getattr(args, "decode", args))

    def _control(
        self, command: int, data: torch.Tensor | None = None, *, rows: int = 0, count: int = 0
    ) -> abi.TierControlArgs:
        args = abi.TierControlArgs(
            tier=self._handle,
            command=command,
            rows=rows,
            count=count,
            data=None if data is None else data.data_ptr(),
        )
        self._call("psa_tier_control", args)
        return args

    def _write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._rows("psa_tier_write", layer, len(slots), slots, k, v)

    def _gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None:
        self._rows("psa_tier_gather", layer, tokens, pages, k_out, v_out)

    def _rows(
        self,
        function: str,
        layer: int,
        count: int,
        index: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        require_cpu(OP, index, k, v)
        args = abi.TierRowsArgs(
            tier=self._handle,
            layer=layer,
            num_threads=torch.get_num_threads(),
            count=count,
            k_token_stride=k.stride(0),
            k_head_stride=k.stride(1),
            v_token_stride=v.stride(0),
            v_head_stride=v.stride(1),
            index=index.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
        )
        self._call(function, args)

    def _decode(
        self, layer: int, step: int, arguments: DecodeArguments, stats: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given, q = arguments, arguments.q
        rule = (given.mode, given.threshold, given.kappa_floor, given.kappa_std)
        batch = (given.page_table, given.seq_lens, *rule)
        optional = (
            given.log_mass,
            given.first_pages,
            given.attended,
            given.kappa_start,
            given.residuals,
        )
        require_cpu(OP, q, *batch, *optional, stats)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        if stats is None:
            stats = torch.empty(len(q), self.shape.num_kv_heads, NUM_STATS)
        args = self._arguments(q, batch)
        args.layer, args.step = layer, step
        decode = args.decode
        head = decode.rows
        head.q = q.data_ptr()
        head.q_row_stride, head.q_head_stride, _ = q.stride()
        head.sm_scale, head.num_threads = given.sm_scale, torch.get_num_threads()
        decode.sink_pages, decode.recent_pages = given.sink_pages, given.recent_pages
        decode.group_pages, decode.group_percent = given.group_pages, given.group_percent
        decode.out, decode.lse, decode.stats = out.data_ptr(), lse.data_ptr(), stats.data_ptr()
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in optional]
        decode.log_mass, decode.first_pages, decode.attended = pointers[:3]
        decode.kappa_start, decode.residuals = pointers[3:]
        self._call("psa_tier_decode", args)
        return out, lse, stats

    def _arguments(self, q: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> abi.TierDecodeArgs:
        """Arguments of a decode; those that depend on the batch stay between layers and steps."""
        if self._batch and self._shape_of_q == q.shape:
            known = zip(self._batch, batch, strict=True)
            if all(old is new for old, new in known):
                return self._decode_args
        page_table, seq_lens, mode, threshold, kappa_floor, kappa_std = batch
        decode = abi.DecodeArgs(
            rows=rows(
                OP,
                q,
                page_table,
                seq_lens,
                num_kv_heads=self.shape.num_kv_heads,
                num_pages=self.shape.num_pages,
                page_size=self.shape.page_size,
                sm_scale=0.0,
            ),
            mode=mode.data_ptr(),
            threshold=threshold.data_ptr(),
            kappa_floor=kappa_floor.data_ptr(),
            kappa_std=kappa_std.data_ptr(),
        )
        self._decode_args = abi.TierDecodeArgs(decode=decode, tier=self._handle)
        self._batch, self._shape_of_q = batch, q.shape
        return self._decode_args

    def _release(self, pages: torch.Tensor) -> None:
        self._control(abi.TIER_RELEASE, pages, count=len(pages))

    def clear(self) -> None:
        self._require_open()
        self._control(abi.TIER_CLEAR)

    def _set_victims(self, order: torch.Tensor) -> None:
        self._control(abi.TIER_VICTIMS, order, rows=order.shape[0], count=order.shape[1])

    def _set_quota(self, frames_per_layer: int) -> None:
        self._control(abi.TIER_QUOTA, count=frames_per_layer)

    def drain(self) -> None:
        self._require_open()
        self._control(abi.TIER_DRAIN)

    def counters(self) -> TierCounters:
        if self._handle:
            self._totals = TierCounters(*self._control(abi.TIER_COUNTERS).counters)
        return self._totals

    def check(self) -> list[str]:
        self._require_open()
        bits = self._control(abi.TIER_CHECK).counters[0]
        problems = [text for bit, text in _PROBLEMS.items() if bits & bit]
        return self.tables.check(self.shape.page_size) + problems

    def close(self) -> None:
        if self._handle:
            self.counters()
        self._handle = None
        self._stop()

    def _require_open(self) -> None:
        if self._handle is None:
            raise RuntimeError(f"{OP}: the tier is closed")


def _destroy(library: ctypes.CDLL, handle: int, keep: object) -> None:
    args = abi.TierControlArgs(tier=handle, command=abi.TIER_DESTROY)
    library.psa_tier_control(ctypes.byref(args))
