"""How well each scorer finds the pages that hold a model's attention, and at how many bytes.

    python -m benchmark.scorer_recall --lengths 4096,8192

Prefills recall contexts (set lines in filler text) with a model of transformers, takes the queries
of answer positions and the keys of all layers, and measures per scorer

bytes      of scorer state read a step, as a share of the keys and values in bfloat16
excess     attention mass missed when every scorer may attend the same number of pages, beyond what
           an oracle misses with as many; and the share of the oracle's pages that it finds (recall)
marginal   attention mass missed and all bytes read (pages and scorer) under the marginal rule

Sink and recent pages are attended by every scorer, as in decoding. Heads weigh alike.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import torch

from benchmark.attention_capture import Capture, recall_captures
from benchmark.common import save
from benchmark.scorer_plot import plot
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape, Scorer, make_scorer
from sgl_psa.scorers.base import PageBatch
from sgl_psa.wrapper import PSADecodeWrapper

PAGE = 16
PAGES_ATTENDED = (2, 4, 8, 16, 32)
DELTAS = (0.3, 0.1, 0.03)
SINK, RECENT = 1, 2
#: label -> settings of the scorer.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"scorer": "mean"},
    "box (Quest)": {"scorer": "box"},
    "gaussian": {"scorer": "gaussian"},
    "cuboid mean (ArkVale)": {"scorer": "cuboid_mean"},
    "hybrid": {"scorer": "hybrid"},
    "box 8 bit": {"scorer": "box", "summary_bits": 8},
    "cuboid mean 8 bit": {"scorer": "cuboid_mean", "summary_bits": 8},
    "hybrid 8 bit": {"scorer": "hybrid", "summary_bits": 8},
    **{f"sketch {b}": {"scorer": "sketch", "sketch_bits": b} for b in (1, 2, 4)},
    **{f"rotated {b}": {"scorer": "rotated_sketch", "sketch_bits": b} for b in (1, 2, 4)},
    **{f"two level 1+{b}": {"scorer": "two_level", "sketch_bits": b} for b in (2, 4)},
    "exact": {"scorer": "exact"},
}


class Layer(NamedTuple):
    """One layer of a capture as a paged cache: the positions are the rows of one batch.

    q [B, Hq, D]; k, v [slots, Hkv, D]; batch: pages 0, 1, ... of one shared context; truth float32
    [B, Hq, pages]: the true log masses.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch: PageBatch
    truth: torch.Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def shape(self) -> CacheShape:
        return CacheShape(1, self.k.shape[0] // PAGE, PAGE, *self.k.shape[1:], torch.device("cpu"))


def paged(capture: Capture) -> Iterator[Layer]:
    """The layers of a capture."""
    lens = torch.tensor(capture.positions, dtype=torch.int32) + 1
    for q, k, v in capture.layers:
        padding = -len(k) % PAGE
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (k, v))
        table = torch.arange(len(k) // PAGE, dtype=torch.int32).expand(len(lens), -1)
        active = torch.ones(len(lens), dtype=torch.uint8)
        layer = Layer(q, k, v, PageBatch(table.contiguous(), lens, active), torch.empty(0))
        scorer = written(make_scorer(PSAConfig(scorer="exact"), layer.shape, "torch"), layer)
        yield layer._replace(truth=scorer.score(0, q, layer.batch, layer.scale))


def written(scorer: Scorer, layer: Layer) -> Scorer:
    """``scorer`` after all keys of ``layer`` were stored."""
    scorer.on_write(0, torch.arange(len(layer.k)), layer.k)
    return scorer


def at_equal_pages(scorer: Scorer, layer: Layer) -> dict[str, list[float]]:
    """Excess of missed mass over the oracle and recall of its pages, by number of pages attended
    besides the forced ones, mean over rows and heads; the scorer's share of the bytes of K and V.
    """
    batch, kv_heads = layer.batch, layer.k.shape[1]
    log_mass = scorer.score(0, layer.q, batch, layer.scale)
    place = torch.arange(log_mass.shape[2])
    pages = torch.div(batch.seq_lens + PAGE - 1, PAGE, rounding_mode="floor")[:, None]
    inside = (place < pages)[:, None]
    forced = inside & ((place < SINK) | (place >= pages - RECENT))[:, None]
    forced_mass = layer.truth.masked_fill(~forced, float("-inf")).logsumexp(-1, keepdim=True)
    share = layer.truth.masked_fill(~inside, float("-inf")).softmax(-1)

    def ranking(estimate: torch.Tensor) -> torch.Tensor:
        """Pages [B, Hkv, n] by the largest share of the mass of a head of the group; the mass of
        the forced pages is known, as in decoding."""
        free = estimate.masked_fill(~inside | forced, float("-inf"))
        total = torch.logaddexp(free.logsumexp(-1, keepdim=True), forced_mass)
        weight = (free - total).unflatten(1, (kv_heads, -1)).amax(2)
        return weight.topk(max(PAGES_ATTENDED), -1).indices

    found, best = ranking(log_mass), ranking(layer.truth)
    group = share.shape[1] // kv_heads

    def mass(chosen: torch.Tensor) -> float:
        """Share of the mass attended."""
        attended = chosen.repeat_interleave(group, 1) | forced
        return (share * attended).sum(-1).mean().item()

    result: dict[str, list[float]] = {"excess": [], "recall": []}
    nothing = torch.zeros(found.shape[:2] + place.shape, dtype=torch.bool)
    for count in PAGES_ATTENDED:
        chosen = nothing.scatter(-1, found[..., :count], True)
        ideal = nothing.scatter(-1, best[..., :count], True)
        result["excess"].append(mass(ideal) - mass(chosen))
        result["recall"].append(chosen.gather(-1, best[..., :count]).float().mean().item())
    cache = 4.0 * PAGE * layer.k.shape[2] * kv_heads * pages.sum().item()
    result["bytes"] = [scorer_bytes(scorer, layer) / cache]
    return result


def scorer_bytes(scorer: Scorer, layer: Layer) -> float:
    """Bytes that the newest ``score`` read, over all rows and KV heads."""
    read = scorer.read_bytes(0)
    if read is not None:
        return read.sum().item()
    pages = torch.div(layer.batch.seq_lens + PAGE - 1, PAGE, rounding_mode="floor")
    return pages.sum().item() * layer.k.shape[1] * scorer.bytes_per_page


def under_marginal(scorer: Scorer, layer: Layer, config: PSAConfig) -> list[tuple[float, float]]:
    """(missed mass, bytes read over bytes of K and V), one for each of DELTAS."""
    batch = layer.batch
    tokens = torch.arange(len(layer.k), dtype=torch.int32)[None]
    rows = torch.zeros(len(batch.seq_lens), dtype=torch.int64)
    total = layer.truth.masked_fill(
        torch.arange(layer.truth.shape[2]) * PAGE >= batch.seq_lens[:, None, None], float("-inf")
    ).logsumexp(-1)
    points = []
    for delta in DELTAS:
        rule = dataclasses.replace(config, delta=delta, min_context=0)
        wrapper = PSADecodeWrapper(rule, scorer, backend=scorer.backend, kv_element_bytes=2)
        table = RuleTable(rule, 1, "cpu")
        table.set(0, RequestRule.default(rule))
        wrapper.plan(tokens, rows, batch.seq_lens, table.rows(rows))
        _, lse = wrapper.run(0, layer.q, layer.k, layer.v, layer.scale)
        step = wrapper.finish()
        assert step is not None
        page_bytes = 4.0 * PAGE * layer.k.shape[2]
        read = step.layer(0).pages_attended * page_bytes + scorer_bytes(scorer, layer)
        dense = step.layer(0).pages_total * page_bytes
        missed = 1 - (lse - total).exp()
        points.append((missed.mean().item(), read / dense))
    return points


def measure(layers: list[Layer], settings: dict[str, Any]) -> dict[str, Any]:
    """Means over layers (of all captures) for one variant."""
    config = PSAConfig(sink_pages=SINK, recent_pages=RECENT, **settings)
    backend = resolve_backend("auto", "cpu")
    sums: dict[str, list[Any]] = defaultdict(list)
    for layer in layers:
        scorer = written(make_scorer(config, layer.shape, backend), layer)
        for key, values in at_equal_pages(scorer, layer).items():
            sums[key].append(values)
        sums["marginal"].append(under_marginal(scorer, layer, config))
    means = {key: torch.tensor(values).mean(0) for key, values in sums.items()}
    return {
        "bytes_share": round(means["bytes"].item(), 5),
        "excess": [round(x, 6) for x in means["excess"].tolist()],
        "recall": [round(x, 4) for x in means["recall"].tolist()],
        "marginal": [
            {"delta": delta, "missed": round(missed, 6), "bytes_share": round(share, 5)}
            for delta, (missed, share) in zip(DELTAS, means["marginal"].tolist(), strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(resources.files("sgl_psa") / "assets" / "recall"))
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--tasks", default="multi_key,tracking")
    parser.add_argument("--contexts", type=int, default=2, help="of each task")
    parser.add_argument("--positions", type=int, default=16, help="answer positions a context")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "options": vars(options) | {"model": options.model.rsplit("/", 1)[-1]},
        "page_size": PAGE,
        "pages_attended": PAGES_ATTENDED,
        "lengths": {},
    }
    for tokens in map(int, options.lengths.split(",")):
        captures = recall_captures(
            options.model, options.tasks.split(","), tokens, options.contexts, options.positions
        )
        layers = [layer for capture in captures for layer in paged(capture)]
        rows: dict[str, Any] = {}
        report["lengths"][str(tokens)] = {
            "tokens": [len(capture.layers[0].k) for capture in captures],
            "head_dim": captures[0].layers[0].k.shape[2],
            "scorers": rows,
        }
        for label, settings in VARIANTS.items():
            row = rows[label] = measure(layers, settings)
            rule = row["marginal"][DELTAS.index(0.1)]
            print(
                f"{tokens:6d} {label:22s} bytes {row['bytes_share']:.4f} excess at "
                f"{PAGES_ATTENDED[2]} pages {row['excess'][2]:.4f} recall {row['recall'][2]:.3f} | "
                f"delta 0.1: missed {rule['missed']:.4f} bytes {rule['bytes_share']:.4f}",
                flush=True,
            )
        save("scorer_recall", report)
    print(plot(report))


if __name__ == "__main__":
    main()
