"""A server that keeps means and norms of values: it answers, and says what it read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import reads
from test.server.conftest import COMMON, PAGE, PSA, flags, running
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW, LENGTH, BITS = 9, 1500, 2


@pytest.fixture(scope="module")
def compensating(model: Path, logs: Path) -> Iterator[Server]:
    settings = {"psa_stop": "change", "psa_compensate": True, "max_total_tokens": 16384}
    settings["psa_scorer"] = "sketch"  # one level, so that every page scored costs the same
    options = flags(model_path=model, **settings, **COMMON, **PSA)
    with running(Server("compensating", options, logs / "compensating.log")) as process:
        yield process


@pytest.mark.parametrize("stop", ["change", "marginal"])
def test_every_byte_is_counted(
    compensating: Server, prompts: Prompts, model: Path, stop: str
) -> None:
    """Keys and values of what was attended, sketches, means of the rest, and norms."""
    config = json.loads((model / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    ids = prompts.filler(LENGTH, seed=9900)
    params = {"psa_stop": stop, "psa_delta": 0.2}
    answer = compensating.generate(ids, max_new_tokens=NEW, ignore_eos=True, custom_params=params)
    psa = reads(answer)
    assert (psa["stop"], psa["knob"], psa["stale_pages"]) == (stop, 0.2, 0)
    assert 0 < psa["pages_fraction"] < psa["bytes_fraction"] < 1 and 0 < psa["coverage"] <= 1
    lengths = [len(ids) + step for step in range(1, NEW)]
    pages = heads * sum(-(-length // PAGE) for length in lengths)
    assert psa["pages_total"] == pages
    tokens = psa["pages_attended"] * PAGE - heads * sum(-length % PAGE for length in lengths)
    sketches = pages * PAGE * (dim * BITS // 8 + 4)
    means = (pages - psa["pages_attended"]) * 2 * dim
    norms = 4 * pages if stop == "change" else 0
    assert psa["bytes_read"] == tokens * 2 * dim * 4 + sketches + means + norms
