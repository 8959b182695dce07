"""Check of whole decode steps in a CUDA graph: scorer, wrapper, statistics and predictions."""

from __future__ import annotations

import torch
from sglang_psa.decode_graph import LateSteps, LateTable

from benchmark.gpu.close import close
from benchmark.gpu.pool import make_pool
from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.static_plan import StaticPlanner
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper

BATCHES = ([1, 2, 3], [3, 1, 0], [2, 0, 0])


def check_steps(device: str, predict: bool) -> float:
    """Capture a step, replay it with other requests: as the same steps without a graph.

    On the CPU ``run`` takes the place of the replay.
    """
    cuda = device == "cuda"
    lengths = [3000, 900, 1777] if cuda else [70, 20, 40]
    pool = make_pool(
        lengths, page=16, q_heads=8, kv_heads=2, dim=64, dtype=torch.float16, device=device
    )
    config = PSAConfig(
        min_context=16,
        group_pages=2,
        delta=0.3,
        candidate_pages=16,
        predict=predict,
        **({"stop": "coverage", "coverage": 0.7} if predict else {}),
    )
    where = torch.device(device)
    shape = CacheShape(1, pool.num_pages, pool.page, pool.num_kv, 64, where)
    summaries = make_summaries(config, shape, "triton")
    width = pool.page_table.shape[1] * pool.page
    tokens = torch.zeros(len(lengths) + 1, width, dtype=torch.int32, device=where)
    for row, length in enumerate(lengths):
        tokens[row + 1, :length] = pool.slots(row).int()
        summaries.on_write(0, pool.slots(row), pool.k, pool.v)
    eager, static = (
        PSADecodeWrapper(
            config, summaries.scorer, backend="triton", kv_element_bytes=2, values=summaries.values
        )
        for _ in range(2)
    )
    planner, table = StaticPlanner(static, 3, width, 8), RuleTable(config, 4, where)
    for slot in (1, 2, 3):
        table.set(slot, RequestRule.default(config))
    q = torch.zeros(3, 8, 64, dtype=torch.float16, device=where)

    def run(wrapper: PSADecodeWrapper, queries: torch.Tensor) -> torch.Tensor:
        return wrapper.run(0, queries, pool.k, pool.v, pool.scale)[0]

    new = torch.zeros(3, dtype=torch.int64, device=where)

    def write_and_run() -> torch.Tensor:
        summaries.on_write(0, new, pool.k, pool.v)
        return run(static, q)

    none = torch.zeros_like(new)
    planner.plan(tokens, none, none + 1, table.rows(none), capture=True)
    captured = write_and_run()
    if cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = write_and_run()
    worst, late, before = 0.0, LateSteps(), None
    for number, batch in enumerate(BATCHES):
        slots, real = torch.tensor(batch, device=where), sum(slot > 0 for slot in batch)
        lens = torch.tensor([lengths[slot - 1] if slot else 1 for slot in batch], device=where)
        # The newest token of each request, written anew; padding goes to page 0, which nobody has.
        new.copy_(tokens[slots, lens - 1] * (slots > 0))
        q.copy_(1.5 * torch.randn(q.shape, generator=torch.Generator().manual_seed(number)))
        padding = len(batch) - real
        planner.plan(tokens, slots, lens, table.rows(slots), num_padding=padding)
        if cuda:
            graph.replay()
        else:
            captured = write_and_run()
        step = planner.finish()
        eager.plan(tokens, slots[:real], lens[:real], table.rows(slots[:real]))
        want, wanted = run(eager, q[:real]), eager.finish()
        if step is None or wanted is None:
            raise AssertionError("a step has no statistics")
        worst = max(worst, close("out", captured[:real], want, 1e-3, 1e-3))
        close("statistics", step.table[:, :real], wanted.table, 1e-5, 1e-5)
        rows = torch.tensor(LateTable(step.table.sum(0)).rows, dtype=torch.float64)
        close("rows fetched late", rows, step.table.sum(0), 0.0, 0.0)
        known = late.swap(step)
        if cuda and before is None:
            assert known is None
        else:
            expected = before if cuda else step
            assert known is not None and expected is not None
            close("step fetched late", known.table, expected.table, 0.0, 0.0)
        before = step
    return worst
