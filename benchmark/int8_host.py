"""What an int8 host tier does to answers, to attention and to the time of a page.

    python -m benchmark.int8_host --queries 20

answers    exact matches and perplexity of the embedded model under the default policy, over two
           tiers with frames for all pages, the host in the KV cache's dtype and in int8
attention  relative error of dense outputs when the full pages of a context are rounded, at answer
           positions, over layers and query heads
times      microseconds to write a full page to a frame and the host, and to read one from the host
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from sgl_psa_kernels.page_tier import HostStore, codec, make_tier

from benchmark.attention_capture import LayerCapture, recall_captures
from benchmark.common import save
from sgl_psa.config import HostDtypeName
from sgl_psa.evaluate import cli, policy_spec
from sgl_psa.evaluate.arena import Arena
from sgl_psa.evaluate.in_process import InProcess, load_model
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.measurement import questions
from sgl_psa.evaluate.tasks import TASKS
from sgl_psa.memory.sizes import tier_shape

PAGE = 16
KINDS: tuple[HostDtypeName, ...] = get_args(HostDtypeName)
#: Pages that are written and read at a time, and how often: the fastest counts.
PAGES, RUNS = 400, 15


def answers(tasks: list[str], tokens: int, queries: int) -> dict[str, dict[str, float]]:
    """Score by task and host dtype; the questions are the same."""
    model, tokenizer = load_model(str(cli.EMBEDDED), "float32", "cpu")
    spec = policy_spec.parse("psa:marginal:0.05")
    scores: dict[str, dict[str, float]] = {}
    for name in tasks:
        material, examples = Material(tokenizer, RECALL), []
        while sum(map(questions, examples)) < queries:
            examples.append(TASKS[name].build(material, tokens, str(len(examples))))
        scores[name] = {}
        for kind in KINDS:
            runner = InProcess(
                model,
                tokenizer,
                name="embedded",
                folder=cli.EMBEDDED,
                chat=False,
                arena=Arena(1.0, host_dtype=kind),
            )
            (found,) = runner.measure(examples, [spec], lambda count: None)
            scores[name][kind] = found.score(TASKS[name].metric)
            print(f"{name} {kind}: {scores[name][kind]} ({found.queries} questions)", flush=True)
    return scores


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The full pages of x [tokens, Hkv, D] in int8 and back; dim 1: by channel, 3: by token."""
    full = len(x) // PAGE * PAGE
    pages = x[:full].unflatten(0, (-1, PAGE))
    return torch.cat(
        [codec.dequantise(*codec.quantise(pages, dim), dim, x.dtype).flatten(0, 1), x[full:]]
    )


def outputs(layer: LayerCapture, positions: list[int]) -> torch.Tensor:
    """Dense attention [positions, Hq, D] in float32."""
    q, k, v = (x.float().transpose(0, 1) for x in layer)
    mask = torch.arange(k.shape[1]) <= torch.tensor(positions)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    ).transpose(0, 1)


def attention(tasks: list[str], tokens: int) -> dict[str, float]:
    """Errors of an output, relative to its norm: mean, 99th percentile and largest."""
    errors = []
    for capture in recall_captures(cli.EMBEDDED, tasks, tokens, contexts=1, positions=16):
        for layer in capture.layers:
            exact = outputs(layer, capture.positions)
            in_int8 = LayerCapture(layer.q, rounded(layer.k, 1), rounded(layer.v, 3))
            error = outputs(in_int8, capture.positions) - exact
            errors.append((error.norm(dim=-1) / exact.norm(dim=-1)).flatten())
    found = torch.cat(errors)
    return {
        "mean": found.mean().item(),
        "percentile 99": found.quantile(0.99).item(),
        "largest": found.max().item(),
    }


def fastest(work: Callable[[], None], before: Callable[[], None]) -> float:
    """Microseconds a page."""
    best = float("inf")
    for _ in range(RUNS):
        before()
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return round(1e6 * best / PAGES, 2)


def times(kind: HostDtypeName, heads: int, dim: int) -> dict[str, float]:
    """Bytes of a page of bfloat16, and microseconds a page; host in memory, one thread."""
    page = tier_shape(
        kind, num_layers=1, page_size=PAGE, num_kv_heads=heads, head_dim=dim, dtype=torch.bfloat16
    )
    shape = page._replace(num_pages=2 * PAGES, num_frames=PAGES)
    tier = make_tier(shape, HostStore.memory(shape.host_bytes), backend="cpu")
    k, v = torch.randn(2, PAGES * PAGE, heads, dim).bfloat16()
    k_out, v_out = torch.empty_like(k), torch.empty_like(v)
    slots, away = torch.arange(PAGES * PAGE), torch.arange(PAGES, 2 * PAGES)
    write = fastest(lambda: tier.write(0, slots, k, v), tier.clear)
    tier.write(0, slots + PAGES * PAGE, k, v)  # All frames are taken: to the host.
    read = fastest(lambda: tier.gather(0, away, len(k), k_out, v_out), tier.drain)
    tier.close()
    return {"bytes": shape.record_bytes, "write": write, "read": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=20, help="of each task, at least")
    parser.add_argument("--tasks", default="multi_key,all_needle,text")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"options": vars(options), "page_size": PAGE}
    report["times"] = {
        f"{heads} KV heads of 128": {kind: times(kind, heads, 128) for kind in KINDS}
        for heads in (2, 8)
    }
    print(report["times"], flush=True)
    report["attention"] = attention(["single", "multi_key"], options.tokens)
    print(report["attention"], flush=True)
    report["answers"] = answers(options.tasks.split(","), options.tokens, options.queries)
    print(save("int8_host", report))


if __name__ == "__main__":
    main()
