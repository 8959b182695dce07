"""Every Triton operator on a GPU against a float64 run of its reference on the CPU.

    python -m benchmark.gpu.check
    TRITON_INTERPRET=1 python -m benchmark.gpu.check --device cpu --tiny     # without a GPU

Prints a line a check and exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sgl_psa_kernels import page_summary
from sgl_psa_kernels.key_sketch.packing import packed_rows, unpack
from sgl_psa_kernels.merge_state import merge_state
from sgl_psa_kernels.page_summary.storage import load
from sgl_psa_kernels.progressive_decode import STAT_NAMES, flashinfer_rows, progressive_decode

from benchmark.gpu.check_pages import check_candidates, check_compensation
from benchmark.gpu.check_steps import check_steps
from benchmark.gpu.close import close
from benchmark.gpu.pool import Pool, Sketch, make_pool, make_sketch, score
from sgl_psa import kernel_check
from sgl_psa.config import PSAConfig
from sgl_psa.scorers import CacheShape

INF = float("inf")
#: (mode, threshold, kappa_floor, kappa_std), one a row.
RULES = (
    (0, 0.0, 0.0, 0.0),
    (1, math.log(0.3), 0.0, 0.0),
    (1, math.log(0.02), 0.0, 0.0),
    (2, math.log(0.25), 0.0, 1.0),
    (2, -INF, 0.0, 0.0),
    (3, math.log(0.25), -INF, 1.0),
)


@dataclass(frozen=True)
class Shape:
    """Pages of ``page`` tokens, ``group`` query heads to each of ``kv_heads``."""

    dtype: torch.dtype
    dim: int
    page: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind} D{self.dim} P{self.page} Hkv{self.kv_heads} G{self.group}"


SHAPES = (
    Shape(torch.bfloat16, 128, 16, 8, 4),
    Shape(torch.bfloat16, 128, 64, 2, 8),
    Shape(torch.bfloat16, 64, 32, 4, 1),
    Shape(torch.float16, 80, 16, 2, 5),
    Shape(torch.float16, 256, 128, 2, 2),
    Shape(torch.float32, 96, 8, 2, 3),
)
TINY = (Shape(torch.float16, 32, 16, 1, 2),)


def pools(shape: Shape, tiny: bool, device: str) -> tuple[Pool, Pool]:
    """Ragged rows on the CPU and on the device, with NaN in unused slots."""
    lengths = [90, 1, 80, 0, 33, 64] if tiny else [3000, 1, 5000, 0, 777, 1024]
    host = make_pool(
        lengths,
        page=shape.page,
        q_heads=shape.kv_heads * shape.group,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        dtype=shape.dtype,
        device="cpu",
        poison=True,
    )
    return host, host.to(device)


def decode(
    pool: Pool,
    log_mass: torch.Tensor | None,
    backend: str,
    group_pages: int = 4,
    **options: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = pool.q.device
    columns = list(zip(*RULES, strict=True))
    mode = torch.tensor(columns[0], dtype=torch.int32, device=device)
    if log_mass is None:
        mode = torch.zeros_like(mode)
    return progressive_decode(
        pool.q,
        pool.k,
        pool.v,
        pool.page_table,
        pool.seq_lens,
        log_mass,
        mode,
        *(torch.tensor(column, device=device) for column in columns[1:]),
        page_size=pool.page,
        sm_scale=pool.scale,
        sink_pages=1,
        recent_pages=2,
        group_pages=group_pages,
        backend=backend,
        **options,
    )


def check_decode(
    shape: Shape,
    tiny: bool,
    device: str,
    predicted: bool,
    group: int,
    known: bool,
    backend: str = "triton",
) -> float:
    """``known``: with a correction to start from, and residuals told."""
    host, pool = pools(shape, tiny, device)
    log_mass = score(host, make_sketch(host, "reference"), "reference")
    log_mass[0, :, 1] = INF
    first, shown = {}, {}
    if predicted:
        first = {"first_pages": torch.full((host.batch, shape.kv_heads), 9, dtype=torch.int32)}
    heads = (host.batch, shape.kv_heads * shape.group)
    if known:
        rng = torch.Generator().manual_seed(5)
        first["kappa_start"] = torch.randn(heads, generator=rng)
    size = (host.batch, shape.kv_heads, host.page_table.shape[1])
    want_read = torch.zeros(size, dtype=torch.uint8)
    exact = host.to("cpu", torch.float64)
    want_sums = torch.zeros(*heads, 3)
    sums = want_sums.to(device)
    shown = {name: value.to(device) for name, value in first.items()}
    if known:
        first["residuals"], shown["residuals"] = want_sums, sums
    want = decode(exact, log_mass, "reference", group, attended=want_read, **first)
    read = torch.ones_like(want_read, device=device)
    got = decode(pool, log_mass.to(device), backend, group, attended=read, **shown)
    close("residuals", sums, want_sums, 1e-3, 1e-3)
    if not torch.equal(read.cpu(), want_read):
        pages = int((read.cpu() != want_read).sum())
        raise AssertionError(f"attended: {pages} pages differ from the reference")
    statistics = len(STAT_NAMES)
    assert got[2].shape[-1] == statistics
    close("statistics", got[2], want[2], 1e-3, 1e-4)
    close("lse", got[1], want[1], 1e-5, 1e-4)
    return close("out", got[0], want[0], *out_error(shape, backend))


def out_error(shape: Shape, backend: str) -> tuple[float, float]:
    """(relative, absolute) error of an output; FlashInfer rounds partial results as well."""
    unit = torch.finfo(shape.dtype).eps if shape.dtype != torch.float32 else 1e-5
    unit *= 2 if backend == "flashinfer" else 1
    return unit, 4 * unit


def check_dense(shape: Shape, tiny: bool, device: str, backend: str = "triton") -> float:
    host, pool = pools(shape, tiny, device)
    want = decode(host.to("cpu", torch.float64), None, "reference")
    got = decode(pool, None, backend)
    close("lse", got[1], want[1], 1e-5, 1e-4)
    return close("out", got[0], want[0], *out_error(shape, backend))


def check_graph(shape: Shape, tiny: bool, device: str, backend: str = "triton") -> float:
    """Capture scoring and decode, change the queries in place, replay: as without a graph."""
    _, pool = pools(shape, tiny, device)
    sketch = make_sketch(pool, "triton")
    first = torch.full((pool.batch, shape.kv_heads), 9, dtype=torch.int32, device=device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return decode(pool, score(pool, sketch, "triton"), backend, first_pages=first)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    pool.q.copy_(pool.q.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    return max(close("replay", a, b, 0.0, 0.0) for a, b in zip(captured, step(), strict=True))


def check_start(shape: Shape) -> float:
    """That of a server; it names the errors that it finds, and no number if it finds none."""
    cache = CacheShape(1, 1, shape.page, shape.kv_heads, shape.dim, torch.device("cuda"))
    kernel_check.check_kernels(
        PSAConfig(),
        cache,
        backend="triton",
        dtype=shape.dtype,
        num_qo_heads=shape.kv_heads * shape.group,
        make_graph=kernel_check.cuda_graph,
    )
    return 0.0


def check_sketch(shape: Shape, tiny: bool, device: str, bits: int, rotated: bool) -> float:
    host, pool = pools(shape, tiny, device)
    want, got = (
        make_sketch(host, "reference", bits, rotated),
        make_sketch(pool, "triton", bits, rotated),
    )
    close("affine", got.affine, want.affine, 2e-3, 1e-3)
    different = unpack(packed_rows(got.codes.cpu()), bits) != unpack(packed_rows(want.codes), bits)
    if float(different.float().mean()) > 2e-3:
        raise AssertionError(f"codes: {float(different.float().mean()):.2%} differ")
    moved = Sketch(
        *(t.to(device) for t in (want.codes, want.affine, want.watermark, want.active)), bits
    )
    truth = score(host.to("cpu", torch.float64) if not rotated else host, want, "reference")
    estimate = score(pool, moved, "triton").cpu()
    worst = 0.0
    for row, length in enumerate(host.seq_lens.tolist()):
        pages = -(-length // host.page)
        part = (estimate[row, :, :pages], truth[row, :, :pages])
        worst = max(worst, close("score", *part, 2e-4, 2e-3))
    return worst


def check_summary(shape: Shape, tiny: bool, device: str, kind: str, bits: int) -> float:
    host, pool = pools(shape, tiny, device)
    pages, fills = [], []
    for row, length in enumerate(host.seq_lens.tolist()):
        count = -(-length // host.page)
        pages.append(host.page_table[row, :count].long())
        fills.append((length - host.page * torch.arange(count)).clamp(max=host.page).int())
    size = (host.num_pages, shape.kv_heads, page_summary.VECTORS[kind], shape.dim)
    results, summaries = [], {}
    for place, name in ((host, "reference"), (pool, "triton")):
        where = place.q.device
        summary = torch.zeros(size, dtype=torch.bfloat16, device=where)
        affine = None
        if bits == 8:
            summary = summary.to(torch.uint8)
            affine = torch.zeros(*size[:3], 2, dtype=torch.bfloat16, device=where)
        page, fill = torch.cat(pages).to(where), torch.cat(fills).to(where)
        options = {"kind": kind, "page_size": host.page, "backend": name}
        page_summary.update(place.k, page, fill, summary, affine=affine, **options)
        summaries[name] = (summary, affine)
        full = torch.full((host.num_pages,), host.page, dtype=torch.int32, device=where)
        active = torch.ones(host.batch, dtype=torch.uint8, device=where)
        q = place.q.double() if name == "reference" else place.q
        state, pairs = (x if x is None else x.to(where) for x in summaries["reference"])
        results.append(
            page_summary.score(
                q, state, full, place.page_table, place.seq_lens, active,
                sm_scale=host.scale, affine=pairs, **options,
            )
        )  # fmt: skip
    got, want = (load(*summaries[name], slice(None)) for name in ("triton", "reference"))
    step = 0.0 if bits == 16 else 1.01 * float((want.amax(-1) - want.amin(-1)).max()) / 250
    close("summary", got, want, 2**-7, 1e-6 + step)
    worst = 0.0
    for row, length in enumerate(host.seq_lens.tolist()):
        count = -(-length // host.page)
        part = (results[1][row, :, :count], results[0][row, :, :count])
        worst = max(worst, close("score", *part, 1e-4, 1e-4))
    return worst


def check_merge(shape: Shape, tiny: bool, device: str) -> float:
    rng = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 40, shape.dim, generator=rng).to(shape.dtype)
    lses = 10 * torch.randn(2, 40, generator=rng)
    lses[0, ::3], lses[1, ::4] = -INF, -INF
    want = merge_state(outputs[0].double(), lses[0], outputs[1].double(), lses[1])
    here, there = outputs.to(device), lses.to(device)
    got = merge_state(here[0], there[0], here[1], there[1], backend="triton")
    close("lse", got[1], want[1], 1e-5, 1e-5)
    unit = torch.finfo(shape.dtype).eps
    return close("out", got[0], want[0], unit, 1e-5)


def flashinfer_checks(
    shape: Shape, tiny: bool, device: str
) -> Iterator[tuple[str, Shape, Callable[[], float]]]:
    """Those of the lists that FlashInfer attends, where it has kernels."""
    try:
        if device != "cuda":
            raise ValueError(f"FlashInfer has no kernels for {device}")
        flashinfer_rows.check("FlashInfer", shape.dtype, shape.dim)
    except (ValueError, RuntimeError) as error:
        print(f"left out for {shape}: {error}", flush=True)
        return
    for name, predicted, group in (
        ("large groups", False, 512 // shape.page),
        ("predicted", True, 4),
    ):
        what = (tiny, device, predicted, group, False, "flashinfer")
        name = f"progressive_decode, FlashInfer, {name}"
        yield name, shape, lambda s=shape, w=what: check_decode(s, *w)
    what = (tiny, device, "flashinfer")
    name = "progressive_decode, FlashInfer, "
    yield name + "dense", shape, lambda s=shape, w=what: check_dense(s, *w)
    yield name + "CUDA graph", shape, lambda s=shape, w=what: check_graph(s, *w)


def checks(tiny: bool, device: str) -> Iterator[tuple[str, Shape, Callable[[], float]]]:
    """(name, shape, check); a check returns its largest error."""
    for shape in TINY if tiny else SHAPES:
        for name, *what in (
            ("", False, 4, False),
            (", first group predicted", True, 4, False),
            (", large groups", False, 512 // shape.page, False),
            (", residuals", False, 4, True),
            (", predicted, residuals, large groups", True, 512 // shape.page, True),
        ):
            name = f"progressive_decode{name}"
            yield name, shape, lambda s=shape, w=what: check_decode(s, tiny, device, *w)
        yield "progressive_decode, dense", shape, lambda s=shape: check_dense(s, tiny, device)
        yield from flashinfer_checks(shape, tiny, device)
        if device == "cuda":
            yield (
                "score and decode, CUDA graph",
                shape,
                lambda s=shape: check_graph(s, tiny, device),
            )
            yield "start-up check, CUDA graph", shape, lambda s=shape: check_start(s)
        for bits in (1, 2, 4):
            for rotated in (False, True):
                name = f"key_sketch, {bits} bit{', rotated' if rotated else ''}"
                yield (
                    name,
                    shape,
                    lambda s=shape, b=bits, r=rotated: check_sketch(s, tiny, device, b, r),
                )
        for kind in page_summary.VECTORS:
            for bits in (8, 16):
                name = f"page_summary, {kind}, {bits} bits"
                yield (
                    name,
                    shape,
                    lambda s=shape, k=kind, b=bits: check_summary(s, tiny, device, k, b),
                )
        host, pool = pools(shape, tiny, device)
        yield "candidate_pages", shape, lambda h=host, p=pool: check_candidates(h, p)
        yield "tail_compensation", shape, lambda h=host, p=pool: check_compensation(h, p)
    for predict in (False, True):
        name = "decode step, CUDA graph" + (", predicted" if predict else "")
        yield name, TINY[0], lambda p=predict: check_steps(device, p)
        yield "merge_state", shape, lambda s=shape: check_merge(s, tiny, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape, for the interpreter")
    options = parser.parse_args()
    failed = 0
    for name, shape, check in checks(options.tiny, options.device):
        try:
            worst, verdict = f"{check():.2e}", "ok"
        except Exception as error:  # Whatever a kernel raises is a failed check; go on with others.
            failed += 1
            worst, verdict = "", f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        print(f"{name:42} {shape!s:30} {worst:9} {verdict}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
