"""How groups that grow trade pages for rounds: what ``--psa-group-percent`` costs and saves.

    python -m benchmark.group_growth --percents 0,50,100,200,400,1000 --sizes 8,16,32

A round is what a GPU cannot overlap: it reads a group, then decides. For each percentage, and for
larger groups that do not grow, means over (request, layer, KV head) of decode steps of the embedded
model on text with lookups, and of one step on made-up keys (``benchmark.ops.keys``); without growth
rounds are those of CPUs. Counts, not times: they hold for any device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmark.common import RESULTS, integers, save
from benchmark.ops.decode import COVERAGE
from benchmark.ops.setting import Setting
from benchmark.panels import save_panels
from benchmark.prediction import Request, decode, replays
from sgl_psa.audit.capture import EMBEDDED_MODEL, CapturedModel
from sgl_psa.audit.replay import Replay
from sgl_psa.config import PSAConfig
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import make_scorer
from sgl_psa.wrapper import PSADecodeWrapper

RULES: dict[str, dict[str, Any]] = {
    "marginal": {},
    f"coverage {COVERAGE}": {"stop": "coverage", "coverage": COVERAGE},
}


def of_model(replay: Replay, config: PSAConfig) -> PSADecodeWrapper:
    """All steps of a captured model's requests."""
    scorer = make_scorer(config, replay.cache_shape, "cpu")
    request = Request(replay, config, scorer, "cpu")
    decode([request], replay, scorer)
    return request.wrapper


def of_made_up(s: Setting, config: PSAConfig) -> PSADecodeWrapper:
    """One step of one layer on keys of which few hold most of the mass."""
    wrapper = PSADecodeWrapper(config, s.scorer(config), backend="cpu", kv_element_bytes=2)
    rows = torch.arange(s.batch)
    wrapper.plan(s.slots.int(), rows, s.seq_lens, RuleTable(config, s.batch, "cpu").rows(rows))
    wrapper.run(0, s.q, s.k[0], s.v[0], s.scale)
    wrapper.finish()
    return wrapper


def row(source: str, tokens: int, rule: str, wrapper: PSADecodeWrapper) -> dict[str, Any]:
    """What is kept of a measurement; pages and rounds are of a (request, layer, KV head), coverage
    and error, against dense attention, of a query head."""
    config, counts, audit = wrapper.config, wrapper.stats.total(), wrapper.audit
    assert audit is not None
    true = audit.total()
    return {
        "source": source,
        "tokens": tokens,
        "stop": rule,
        "group_pages": config.group_pages,
        "group_percent": config.group_percent,
        "pages": counts.pages_attended / counts.visits,
        "rounds": counts.rounds / counts.visits,
        "bytes_fraction": counts.bytes_read / counts.bytes_dense,
        "true_coverage": true.coverage / true.rows,
        "violation_rate": true.violations / true.requested_rows if true.requested_rows else None,
        "relative_error": true.error / true.rows,
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every source, rule and percentage."""
    model = CapturedModel(str(EMBEDDED_MODEL))
    seeds = range(options.seed, options.seed + options.contexts)
    replay = replays(model, options.model_tokens, options.steps, seeds, 16)[1]
    setting = Setting(options.made_up_tokens, 1, pool_bytes=1, min_layers=1)
    for rule, settings in RULES.items():
        base = PSAConfig(min_context=0, audit_rate=1.0, **settings)
        growing = [{"group_percent": percent} for percent in integers(options.percents)]
        larger = [{"group_percent": 0, "group_pages": size} for size in integers(options.sizes)]
        for change in growing + larger:
            config = replace(base, **change)
            found = of_model(replay, config)
            yield row("embedded model", options.model_tokens, rule, found)
            made_up = of_made_up(setting, config)
            yield row("made-up keys", options.made_up_tokens, rule, made_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--percents", default="0,50,100,200,400,1000")
    parser.add_argument("--sizes", default="8,16,32")
    parser.add_argument("--model-tokens", type=int, default=8192)
    parser.add_argument("--made-up-tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for found in measure(options):
        rows.append(found)
        print(
            f"{found['source']}, {found['tokens']} tokens, {found['stop']}, groups of "
            f"{found['group_pages']} and {found['group_percent']} %: {found['pages']:.1f} pages, "
            f"{found['rounds']:.2f} rounds, {found['bytes_fraction']:.3f} of the bytes, "
            f"coverage {found['true_coverage']:.4f}, error {found['relative_error']:.4f}",
            flush=True,
        )
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for found in rows:
        title = f"{found['source']}, {found['tokens']} tokens"
        kind = ", growing" if found["group_percent"] else ", of one size"
        points = panels.setdefault(title, {}).setdefault(found["stop"] + kind, [])
        points.append((found["rounds"], found["pages"]))
    save_panels(RESULTS / "group_growth.png", panels, "rounds", "pages attended")
    save("group_growth", {"settings": vars(options), "results": rows})


if __name__ == "__main__":
    main()
