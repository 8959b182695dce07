"""Whether the kernels of a backend are right on this device: one small cache, decoded at start-up.

The keys of a few pages attract each query and all others repel it, so what is left unread carries
no weight, and sparse decoding has to give what dense attention gives, which is computed in float64
on the CPU. Where the server will capture steps in CUDA graphs, one is captured here and replayed on
other queries. Heads, types and settings are the server's; the number of pages is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.static_plan import StaticPlanner
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper

logger = logging.getLogger(__name__)

#: Pages that attract the queries of a KV head, and the logits of their tokens and of all others.
HOT_PAGES, HOT, COLD = 24, 7.0, -9.0
#: Pages of the longest request.
PAGES = 96
#: Under which pages are attended or not by far.
KNOBS: dict[str, Any] = {"min_context": 0, "coverage": 0.999, "delta": 1e-4, "correction_std": 0.0}
#: Settings of the server that say which kernels run, and with which constants.
KEPT = (
    "stop",
    "scorer",
    "sketch_bits",
    "summary_bits",
    "group_pages",
    "group_percent",
    "sink_pages",
    "recent_pages",
    "candidate_pages",
    "conservative",
    "compensate",
)
#: Rounding of weights and outputs, as multiples of the type's, and mass that is left unread.
ROUNDINGS, LEFT = 4.0, 2e-3


class KernelCheckError(ConfigError):
    """Kernels that cannot run on this device, or that are wrong there."""


class Graph(Protocol):
    """What ``torch.cuda.CUDAGraph`` is for the check."""

    def replay(self) -> None:
        """Run what was captured."""


#: Makes a graph, and a context that captures in it.
MakeGraph = Callable[[], tuple[Graph, AbstractContextManager[Any]]]


class Case(NamedTuple):
    """A cache of one layer, its requests and two steps' queries; see :func:`make_case`."""

    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    seq_lens: torch.Tensor
    queries: tuple[torch.Tensor, torch.Tensor]
    sm_scale: float


def check_kernels(
    config: PSAConfig,
    shape: CacheShape,
    *,
    backend: str,
    dtype: torch.dtype,
    num_qo_heads: int,
    make_graph: MakeGraph | None = None,
) -> None:
    """Decode with the server's settings and shapes, and compare with dense attention.

    Args:
        config: of the server, of which :data:`KEPT` counts; the policy is ``psa`` and, of one
            request, ``dense``.
        shape: of the server's cache; only its number of layers and pages is another here.
        backend: kernel backend, from :func:`sgl_psa.backends.resolve_backend`.
        dtype: of queries, K and V.
        num_qo_heads: of a tensor-parallel rank.
        make_graph: where decode steps will be captured, makes a graph of the device.

    Raises:
        KernelCheckError: a kernel does not compile or run, or an output is wrong; the message names
            the backend that needs none of them.
    """
    begin = time.perf_counter()
    try:
        _check(config, shape, backend, dtype, num_qo_heads, make_graph)
    except Exception as error:  # Whatever a compiler or a driver raises.
        text = f"{type(error).__name__}: {error}".strip()
        raise KernelCheckError(
            f"backend={backend} failed its check on {_name(shape.device)} ({text}): "
            "use --psa-backend torch, which is slower, and report this"
        ) from error
    seconds = time.perf_counter() - begin
    logger.info("PSA: kernels %s checked on %s in %.1f s", backend, _name(shape.device), seconds)


def _check(
    config: PSAConfig,
    shape: CacheShape,
    backend: str,
    dtype: torch.dtype,
    num_qo_heads: int,
    make_graph: MakeGraph | None,
) -> None:
    config = PSAConfig(**{name: getattr(config, name) for name in KEPT}, **KNOBS)
    case = make_case(shape, dtype, num_qo_heads)
    slots = case.k.shape[0]
    shape = shape._replace(num_layers=1, num_pages=slots // shape.page_size)
    summaries = make_summaries(config, shape, backend)
    for row, length in enumerate(case.seq_lens.tolist()):
        # A prompt, then single tokens, the first of which may end a page.
        tokens = case.req_to_token[row, :length].long()
        for part in (tokens[:-2], tokens[-2:-1], tokens[-1:]):
            summaries.on_write(0, part, case.k, case.v)
    wrapper = PSADecodeWrapper(
        config,
        summaries.scorer,
        backend=backend,
        kv_element_bytes=case.k.element_size(),
        values=summaries.values,
    )
    table = RuleTable(config, len(case.seq_lens), shape.device)
    dense_row = len(case.seq_lens) - 1
    table.set(dense_row, RequestRule.parse({"psa_policy": "dense"}, config))
    rows = torch.arange(len(case.seq_lens), device=shape.device)
    first, second = case.queries
    wrapper.plan(case.req_to_token, rows, case.seq_lens, table.rows(rows))
    out, _ = wrapper.run(0, first, case.k, case.v, case.sm_scale)
    _compare("output", out, case, 0, wrapper, wrapper.finish())
    if make_graph is None:
        return
    planner = StaticPlanner(wrapper, len(rows), case.req_to_token.shape[1], num_qo_heads)
    q = first.clone()
    planner.plan(case.req_to_token, rows, case.seq_lens, table.rows(rows), capture=True)
    # Nothing may be compiled or loaded during the capture.
    wrapper.run(0, q, case.k, case.v, case.sm_scale)
    graph, capture = make_graph()
    with capture:
        captured, _ = wrapper.run(0, q, case.k, case.v, case.sm_scale)
    q.copy_(second)
    planner.plan(case.req_to_token, rows, case.seq_lens, table.rows(rows))
    graph.replay()
    _compare("output of a CUDA graph", captured, case, 1, wrapper, planner.finish())


def make_case(shape: CacheShape, dtype: torch.dtype, num_qo_heads: int) -> Case:
    """Requests of one token, of a few pages and of :data:`PAGES`, the last one twice, in pages that
    lie scattered; slots that no token uses hold NaN."""
    rng = torch.Generator().manual_seed(1)
    page, heads, dim = shape.page_size, shape.num_kv_heads, shape.head_dim
    longest = (PAGES - 1) * page + 3
    lengths = [1, 5 * page + 1, longest, longest]
    pages = [-(-n // page) for n in lengths]
    total = sum(pages) + 1
    order = (torch.randperm(total - 1, generator=rng) + 1).tolist()
    k = torch.full((total * page, heads, dim), float("nan"))
    v = k.clone()
    req_to_token = torch.zeros(len(lengths), PAGES * page, dtype=torch.int32)
    # Of the two steps: unit vectors that hot keys point along, one a KV head.
    ways = torch.nn.functional.normalize(torch.randn(2, heads, dim, generator=rng), dim=-1)
    for row, length in enumerate(lengths):
        mine = torch.tensor([order.pop() for _ in range(pages[row])])
        slots = (mine[:, None] * page + torch.arange(page)).flatten()[:length]
        req_to_token[row, :length] = slots.int()
        logits = torch.full((2, length, heads), COLD)
        for step in range(2):
            for head in range(heads):
                hot = torch.randperm(pages[row], generator=rng)[:HOT_PAGES]
                logits[step, torch.isin(torch.arange(length) // page, hot), head] = HOT
        noise = 0.2 * torch.randn(length, heads, dim, generator=rng)
        k[slots] = torch.einsum("snh,shd->nhd", logits, ways) + noise
        v[slots] = torch.randn(length, heads, dim, generator=rng)
    group = num_qo_heads // heads
    queries = []
    for step in range(2):
        q = ways[step].repeat_interleave(group, 0).expand(len(lengths), -1, -1)
        q = q + 0.02 * torch.randn(q.shape, generator=rng)
        queries.append(q.to(shape.device, dtype))
    device = shape.device
    return Case(
        k.to(device, dtype),
        v.to(device, dtype),
        req_to_token.to(device),
        torch.tensor(lengths, device=device),
        (queries[0], queries[1]),
        1.0,
    )


def dense(case: Case, step: int) -> torch.Tensor:
    """Attention of a step's queries in float64 on the CPU, [B, Hq, D]."""
    k, v, q = (t.cpu().double() for t in (case.k, case.v, case.queries[step]))
    group = q.shape[1] // k.shape[1]
    rows = []
    for row, length in enumerate(case.seq_lens.tolist()):
        slots = case.req_to_token[row, :length].long().cpu()
        keys, values = (t[slots].repeat_interleave(group, 1) for t in (k, v))
        logits = torch.einsum("hd,nhd->hn", q[row], keys) * case.sm_scale
        rows.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), values))
    return torch.stack(rows)


def _compare(
    what: str, out: torch.Tensor, case: Case, step: int, wrapper: PSADecodeWrapper, stats: Any
) -> None:
    """Raises ValueError where an output is wrong, or more was read than the rule allows."""
    config, want = wrapper.config, dense(case, step)
    error = (out.double().cpu() - want).abs().amax(dim=(1, 2))
    unit = max(torch.finfo(out.dtype).eps, 1e-5)
    bound = ROUNDINGS * unit * want.abs().max() + LEFT
    if not bool((error <= bound).all()):
        worst = int(torch.where(error.isnan(), float("inf"), error).argmax())
        length = int(case.seq_lens[worst])
        raise ValueError(
            f"{what} of {length} tokens: error {float(error[worst]):.3g} above {float(bound):.3g}"
        )
    sparse = len(case.seq_lens) - 2
    heads = case.k.shape[1]
    read = stats.row(sparse).pages_attended / heads
    wanted = config.sink_pages + max(config.recent_pages, 1) + HOT_PAGES
    # Only a coverage rule fills its last group with pages that have no weight.
    share = wanted * wrapper.group_percent // 100 if config.stop == "coverage" else 0
    most = wanted + max(config.group_pages, share)
    if not HOT_PAGES <= read <= most:
        raise ValueError(f"{what}: {read:g} pages read a KV head, {HOT_PAGES} to {most} expected")


def cuda_graph() -> tuple[Graph, AbstractContextManager[Any]]:
    """A graph of the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    return graph, torch.cuda.graph(graph)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
