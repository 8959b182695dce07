"""Write the budget prior of a model: python -m sgl_psa.calibrate --model MODEL --out prior.json

Decodes the last positions of made contexts under one stop rule (see ``sgl_psa.audit``) and keeps,
by context length, layer and KV head, the quantile ``rho`` of the pages at which the rule stopped.
Half of the contexts make the prior; on the others it reports how often one round of the predicted
pages would have sufficed: cold (from the prior) and warm (from the state of the preceding steps).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sgl_psa.audit.capture import EMBEDDED_MODEL, CapturedModel
from sgl_psa.audit.contexts import make_context
from sgl_psa.audit.replay import Replay
from sgl_psa.audit.settings import Setting
from sgl_psa.budget import BudgetPrior, BudgetState, log_quantile
from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.prediction import least_pages, prior_settings


def needed_pages(replay: Replay, setting: Setting) -> torch.Tensor:
    """n* of every step: int64 [steps, L, contexts, Hkv]."""
    measured = replay.measure([setting])[0]
    pages = torch.stack(measured.pages_by_step).long()
    return pages.unflatten(0, (replay.steps, -1))


def one_round(
    needed: torch.Tensor, pages: int, prior: BudgetPrior, rho: float, least: int = 1
) -> dict[str, float]:
    """How the prediction does on n* [steps, L, B, Hkv] of contexts of ``pages`` pages.

    Args:
        least: pages that the first round reads whatever is predicted.

    Returns:
        cold, warm: share of (layer, context, KV head) whose prediction sufficed at the first step,
        and over the second half of the steps; excess: predicted over needed pages, then.
    """
    steps, layers, batch, heads = needed.shape
    state = BudgetState(batch, layers, heads, rho=rho, least=least)
    slots, count = torch.arange(batch), torch.full((batch,), pages)
    state.start(slots, torch.zeros(batch, dtype=torch.int64), count, prior)
    enough, predicted = torch.zeros(steps), torch.zeros(steps)
    for step in range(steps):
        guess = state.predict(slots, count)
        short = needed[step] > guess
        enough[step], predicted[step] = 1 - short.float().mean(), guess.sum()
        state.update(slots, short, torch.ones(batch, dtype=torch.bool))
    late = steps // 2
    return {
        "cold": float(enough[0]),
        "warm": float(enough[late:].mean()),
        "excess": float(predicted[late:].sum() / needed[late:].sum()),
    }


def calibrate(arguments: argparse.Namespace) -> BudgetPrior:
    """Measure, report and return the prior."""
    model = CapturedModel(arguments.model)
    config = arguments.config
    setting = Setting(config, "corrected", config.coverage)
    pages, quantiles, held_out = [], [], []
    for length in arguments.lengths:
        contexts = [
            model.layers(
                make_context(model.tokenizer, length, arguments.steps, seed).ids, arguments.steps
            )
            for seed in range(arguments.seed, arguments.seed + 2 * arguments.contexts)
        ]
        needed = needed_pages(Replay(contexts, arguments.page_size), setting)
        ours, theirs = needed.split(arguments.contexts, dim=2)
        pages.append(-(-length // arguments.page_size))
        quantiles.append(log_quantile(ours.transpose(1, 2).flatten(0, 1), arguments.rho))
        held_out.append(theirs)
    about = {
        "model": arguments.model,
        **prior_settings(config, arguments.page_size),
    }
    prior = BudgetPrior(torch.tensor(pages), torch.stack(quantiles), about)
    one_round_rate = {
        str(length): one_round(theirs, n, prior, arguments.rho, least_pages(config))
        for length, n, theirs in zip(arguments.lengths, pages, held_out, strict=True)
    }
    about["one_round"] = one_round_rate
    for length, rate in one_round_rate.items():
        print(
            f"{length} tokens: one round suffices cold {100 * rate['cold']:.1f} %, warm "
            f"{100 * rate['warm']:.1f} %, reading {rate['excess']:.2f} x the pages needed",
            flush=True,
        )
    return prior


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sgl_psa.calibrate", description=__doc__)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="Hugging Face model folder")
    parser.add_argument("--out", type=Path, default=Path("out/budget_prior.json"))
    for name, kind in (("stop", str), ("coverage", float), ("delta", float), ("scorer", str)):
        parser.add_argument("--" + name, type=kind, help=f"as the server's --psa-{name}")
    parser.add_argument("--rho", type=float, help="as the server's --psa-predict-rho")
    parser.add_argument("--psa-config", help="further settings, as the server's --psa-config")
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="context tokens")
    parser.add_argument("--contexts", type=int, default=3, help="of each length, for the prior")
    parser.add_argument("--steps", type=int, default=32, help="decode positions of each context")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000, help="of the first context")
    arguments = parser.parse_args(argv)
    arguments.lengths = sorted(int(x) for x in arguments.lengths.split(","))
    flags = {name: getattr(arguments, name) for name in ("stop", "coverage", "delta", "scorer")}
    flags["predict_rho"] = arguments.rho
    # What the server does about predictions is no matter here: page counts are measured without.
    # And in groups of one size, as nothing is read in vain then but a part of the last.
    always = {"min_context": 0, "group_percent": 0, "predict": False, "budget_prior": ""}
    always |= {"audit_rate": 0.0}
    try:
        arguments.config = PSAConfig.from_sources({**flags, **always}, arguments.psa_config, {})
    except ConfigError as error:
        parser.error(str(error))
    arguments.rho = arguments.config.predict_rho
    return arguments


def main() -> None:
    arguments = parse()
    prior = calibrate(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
