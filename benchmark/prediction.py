"""Budget prediction on a model's own queries and keys: rounds, pages, and the time of a step.

    python -m benchmark.prediction --lengths 4096,8192

Requests of one body of text and different questions decode under the default stop rule: without
prediction; with it from nothing (cold), from a calibrated prior (prior), from the state that a
request of the same body left (inherited), and from both starts later on (warm). All variants take
each step in turn; "torch" runs a round as a batch of torch operations, as on GPUs, "cpu" is C++.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmark.common import save
from sgl_psa.audit.capture import EMBEDDED_MODEL, CapturedModel, LayerTensors
from sgl_psa.audit.contexts import make_context
from sgl_psa.audit.replay import Replay
from sgl_psa.budget import BudgetPrior
from sgl_psa.calibrate import calibrate
from sgl_psa.calibrate import parse as calibration
from sgl_psa.config import PSAConfig
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import Scorer, make_scorer
from sgl_psa.stats import ReadCounts
from sgl_psa.wrapper import PSADecodeWrapper

VARIANTS = ("off", "cold", "prior", "inherited")
#: Steps at the start and at the end of a request that are reported apart.
WINDOW = 8


class Request:
    """The rows of a replay under one variant: counts and CPU milliseconds of every step."""

    def __init__(
        self, replay: Replay, config: PSAConfig, scorer: Scorer, backend: str, **options: Any
    ) -> None:
        self.replay = replay
        self.wrapper = PSADecodeWrapper(
            config, scorer, backend=backend, kv_element_bytes=2, **options
        )
        self.table = RuleTable(config, len(replay.contexts), "cpu")
        self.counts: list[ReadCounts] = []
        self.times: list[float] = []

    def step(self, step: int) -> None:
        """Decode position ``step`` in every layer."""
        replay, batch = self.replay, len(self.replay.contexts)
        slots = torch.arange(batch)
        lens = torch.full((batch,), replay.length - replay.steps + step + 1)
        layers = range(len(replay.k))
        q = [torch.stack([c[i].q[:, step] for c in replay.contexts]).bfloat16() for i in layers]
        begin = time.process_time()
        self.wrapper.plan(replay.req_to_token, slots, lens, self.table.rows(slots))
        for i in layers:
            scale = replay.contexts[0][i].sm_scale
            self.wrapper.run(i, q[i], replay.k[i], replay.v[i], scale)
        result = self.wrapper.finish()
        self.times.append((time.process_time() - begin) * 1e3)
        assert result is not None
        sums = ReadCounts()
        for i in layers:
            sums.add(result.layer(i))
        self.counts.append(sums)

    def report(self, steps: slice) -> dict[str, float]:
        """Means over the steps; pages and rounds are of a (request, layer, KV head)."""
        total = ReadCounts()
        for counts in self.counts[steps]:
            total.add(counts)
        return {
            "pages": total.pages_attended / total.visits,
            "bytes_fraction": total.bytes_read / total.bytes_dense,
            "rounds": total.rounds / total.visits,
            "one_round": total.one_round or 0.0,
        }


def write(replay: Replay, scorer: Scorer, start: int, stop: int) -> None:
    """Summarise tokens ``start`` to ``stop`` of every context."""
    slots = replay.req_to_token[:, start:stop].flatten().long()
    for layer, k in enumerate(replay.k):
        scorer.on_write(layer, slots, k)


def decode(requests: Sequence[Request], replay: Replay, scorer: Scorer) -> None:
    """All steps, each by all requests in turn."""
    prompt = replay.length - replay.steps
    write(replay, scorer, 0, prompt)
    for step in range(replay.steps):
        write(replay, scorer, prompt + step, prompt + step + 1)
        for request in requests:
            request.step(step)


def measure(
    first: Replay, second: Replay, config: PSAConfig, prior: BudgetPrior, backend: str
) -> dict[str, Any]:
    """Every variant of the requests of ``second``, whose body those of ``first`` share."""
    on = dataclasses.replace(config, predict=True)
    before = make_scorer(on, first.cache_shape, backend)
    earlier = Request(first, on, before, backend, prior=prior)
    decode([earlier], first, before)
    scorer = make_scorer(on, second.cache_shape, backend)
    requests = {
        "off": Request(second, config, scorer, backend),
        "cold": Request(second, on, scorer, backend),
        "prior": Request(second, on, scorer, backend, prior=prior),
        "inherited": Request(second, on, scorer, backend),
    }
    left, heir = earlier.wrapper.predictor, requests["inherited"].wrapper.predictor
    assert left is not None and heir is not None
    for slot in range(len(second.contexts)):
        heir.inherit(slot, 0, left.snapshot(slot))
    decode(list(requests.values()), second, scorer)
    report = {}
    for name, request in requests.items():
        steady = sorted(request.times[1:])
        report[name] = {
            "start": request.report(slice(WINDOW)),
            "end": request.report(slice(-WINDOW, None)),
            "all": request.report(slice(None)),
            "step_cpu_ms": steady[len(steady) // 2],
        }
    return report


def replays(
    model: CapturedModel, length: int, steps: int, seeds: Sequence[int], page_size: int
) -> tuple[Replay, Replay]:
    """Two questions' requests of each of the same bodies."""
    first: list[list[LayerTensors]] = []
    second: list[list[LayerTensors]] = []
    for seed in seeds:
        context = make_context(model.tokenizer, length + steps, 2 * steps, seed)
        body, middle = context.ids[: context.first], context.first + steps
        first.append(model.layers(context.ids[:middle], steps))
        second.append(model.layers(body + context.ids[middle:], steps))
    return Replay(first, page_size), Replay(second, page_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--stops", default="marginal,coverage")
    parser.add_argument("--scorer", default="sketch")
    parser.add_argument("--backends", default="torch,cpu")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = CapturedModel(options.model)
    lengths = [int(x) for x in options.lengths.split(",")]
    seeds = range(options.seed, options.seed + options.contexts)
    captured = {
        length: replays(model, length, options.steps, seeds, options.page_size)
        for length in lengths
    }
    results: list[dict[str, Any]] = []
    settings = {k: v for k, v in vars(options).items() if k != "model"}
    for stop in options.stops.split(","):
        flags = f"--stop {stop} --scorer {options.scorer} --page-size {options.page_size}"
        flags += f" --lengths {options.lengths} --contexts 2 --steps 32"
        arguments = calibration([*flags.split(), "--model", options.model])
        begin = time.process_time()
        prior = calibrate(arguments)
        cost = time.process_time() - begin
        config = PSAConfig(stop=stop, scorer=options.scorer, min_context=0)
        for length in lengths:
            for backend in options.backends.split(","):
                found = measure(*captured[length], config, prior, backend)
                results.append(
                    {
                        "stop": stop,
                        "tokens": length,
                        "backend": backend,
                        "calibration": prior.about["one_round"][str(length)],
                        "calibration_cpu_s": cost,
                        "variants": found,
                    }
                )
                for name, value in found.items():
                    at = " ".join(
                        f"{when}: {value[when]['pages']:.1f} pages {value[when]['rounds']:.2f} "
                        f"rounds {100 * value[when]['one_round']:.1f} %"
                        for when in ("start", "end")
                    )
                    print(
                        f"{stop} {length} {backend} {name:9} {at} {value['step_cpu_ms']:.1f} ms",
                        flush=True,
                    )
                # Kept as it grows: a run is long on a busy machine.
                save("prediction", {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
