"""From which context on a sparse decode step of our kernels is faster than a dense one.

    python -m benchmark.crossover --lengths 1024,2048,3072,4096,6144,8192

Steps of ``LAYERS`` layers at the default settings, planning and statistics included, sparse and
dense in turn in every round, for several head shapes. The crossover of a shape is the least
measured length from which on sparse decoding is nowhere slower; the value in use,
``sgl_psa.crossover``, is not below the longest one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmark.common import save
from benchmark.ops.setting import Heads, Setting
from sgl_psa.config import PSAConfig
from sgl_psa.crossover import CROSSOVER
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import Scorer
from sgl_psa.wrapper import PSADecodeWrapper

#: Layers of a model, for which a step is planned once.
LAYERS = 16

#: Query heads, KV heads and head dimension: groups of 4, 7 and 8, and small heads.
SHAPES = ((32, 8, 128), (28, 4, 128), (64, 8, 128), (32, 8, 64))


def stepper(s: Setting, scorer: Scorer, policy: str) -> Callable[[int], None]:
    """A whole step over ``LAYERS`` layers of the pool, which begin at the given one."""
    config = PSAConfig(policy=policy, min_context=0)
    wrapper = PSADecodeWrapper(config, scorer, backend=s.backend, kv_element_bytes=2)
    table, rows, slots = RuleTable(config, s.batch, "cpu"), torch.arange(s.batch), s.slots.int()

    def step(first: int) -> None:
        wrapper.plan(slots, rows, s.seq_lens, table.rows(rows))
        for layer in range(first, first + LAYERS):
            wrapper.run(layer, s.q, s.k[layer], s.v[layer], s.scale)
        wrapper.finish()

    return step


def ratio(s: Setting, rounds: int) -> tuple[float, float, float]:
    """Median of sparse over dense CPU time of neighbouring steps, and the medians in ms a layer."""
    scorer = s.scorer(PSAConfig())
    steps = [stepper(s, scorer, policy) for policy in ("psa", "dense")]
    models = s.layers // LAYERS
    for step in steps:
        step(0)
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        # Other layers each time: the caches hold a few steps of a short context.
        for half, (step, mine) in enumerate(zip(steps, times, strict=True)):
            first = (2 * number + half) % models * LAYERS
            begin = time.process_time()
            step(first)
            mine.append((time.process_time() - begin) * 1e3 / LAYERS)
    sparse, dense = times
    share = statistics.median(a / b for a, b in zip(sparse, dense, strict=True))
    return share, statistics.median(sparse), statistics.median(dense)


def crossover(ratios: dict[int, float]) -> int | None:
    """The least length from which on no ratio is above 1; ``None``: the longest one is."""
    best = None
    for length in sorted(ratios, reverse=True):
        if ratios[length] > 1:
            break
        best = length
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,3072,4096,6144,8192")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend, results = "", []
    for shape in SHAPES[: options.shapes]:
        found = {}
        for length in map(int, options.lengths.split(",")):
            setting = Setting(length, options.batch, Heads(*shape), min_layers=2 * LAYERS)
            backend = setting.backend
            found[length], sparse, dense = ratio(setting, options.rounds)
            print(
                f"heads {shape} length {length}: psa {sparse:.3f} ms, dense {dense:.3f} ms, "
                f"ratio {found[length]:.2f}",
                flush=True,
            )
        results.append({"heads": shape, "ratio": found, "crossover": crossover(found)})
        print(f"heads {shape}: crossover {results[-1]['crossover']}", flush=True)
    print(f"in use for backend {backend}: {CROSSOVER[backend]}")
    what = "CPU time of a psa step over that of a dense one, by context; bf16, pages of 16"
    report = {"what": what, "backend": backend, "batch": options.batch, "results": results}
    print(save("crossover", report))


if __name__ == "__main__":
    main()
