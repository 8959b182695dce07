"""What the server says about itself: /psa/stats, meta_info, /metrics, /server_info, the log."""

import json
import re
from pathlib import Path

import pytest

from sgl_psa.config import PSAConfig
from test.server.compare import reads
from test.server.conftest import PAGE
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW = 9
DEFAULT = PSAConfig()


@pytest.fixture(scope="module")
def shape(model: Path) -> tuple[int, int]:
    """Layers and KV heads of the model."""
    config = json.loads((model / "config.json").read_text())
    return config["num_hidden_layers"], config["num_key_value_heads"]


def test_meta_info(server: Server, prompts: Prompts, shape: tuple[int, int]) -> None:
    ids = prompts.recall(1000, seed=7000).ids
    rules = {
        "default": ({}, ("psa", "marginal", DEFAULT.delta)),
        "coverage": ({"psa_coverage": 0.9}, ("psa", "coverage", 0.9)),
        "dense": ({"psa_policy": "dense"}, ("dense", "marginal", DEFAULT.delta)),
    }
    seen = {}
    for name, (rule, (policy, stop, knob)) in rules.items():
        answer = server.generate(ids, max_new_tokens=NEW, ignore_eos=True, custom_params=rule)
        psa = seen[name] = reads(answer)
        assert (psa["policy"], psa["stop"], psa["knob"]) == (policy, stop, knob)
        assert psa["scorer"] == DEFAULT.scorer
        assert psa["decode_steps"] == NEW - 1
        assert 0 < psa["coverage"] <= 1
        assert psa["pages_fraction"] == psa["pages_attended"] / psa["pages_total"]
        assert psa["bytes_fraction"] == psa["bytes_read"] / psa["bytes_dense"]
    info = server.get("/server_info").json()
    layers, heads = shape
    pages = sum(-(-(len(ids) + step) // PAGE) for step in range(1, NEW))
    assert seen["dense"]["pages_total"] == layers * heads * pages
    assert seen["dense"]["bytes_fraction"] == seen["dense"]["pages_fraction"] == 1
    assert seen["dense"]["rounds"] == 0 and seen["dense"]["coverage"] == 1
    for name in ("default", "coverage"):
        assert 0 < seen[name]["pages_fraction"] < seen[name]["bytes_fraction"] < 1
    assert info["psa_min_context"] == 256


def test_every_stream_event_carries_the_reads_so_far(server: Server, prompts: Prompts) -> None:
    events = list(server.stream(prompts.recall(500, seed=7100).ids, max_new_tokens=NEW))
    steps = [reads(event)["decode_steps"] for event in events]
    assert steps == sorted(steps)
    assert steps[0] == 0 and steps[-1] == events[-1]["meta_info"]["completion_tokens"] - 1


def test_stats_route_counts_what_requests_report(
    server: Server, prompts: Prompts, shape: tuple[int, int]
) -> None:
    server.wait_idle()
    before = server.stats()
    answers = [
        server.generate(prompts.recall(n, seed=7200 + n).ids, max_new_tokens=NEW, ignore_eos=True)
        for n in (300, 700, 1100)
    ]
    after = server.stats()
    assert after["active"] is True
    assert after["config"]["min_context"] == 256
    assert after["page_size"] == PAGE and after["tp_size"] == 1 and after["sparse_from"] == 256
    assert after["group_percent"] == 0
    for name in ("pages_attended", "pages_total", "bytes_read", "bytes_dense"):
        said = sum(reads(answer)[name] for answer in answers)
        # A finished request runs one step more, whose token is dropped: overlap scheduling.
        extra = after[name] - before[name] - said
        assert 0 <= extra <= 2 * said / (NEW - 1), name
    assert len(after["layers"]) == shape[0]
    for name in ("visits", "pages_attended", "bytes_read", "stale_pages"):
        assert sum(layer[name] for layer in after["layers"]) == after[name]
    assert after["stale_pages"] == before["stale_pages"]
    assert 0 < after["mean_coverage"] <= 1


def test_metrics(server: Server, prompts: Prompts) -> None:
    def series() -> dict[str, float]:
        lines = server.get("/metrics").text.splitlines()
        found = [re.match(r"(sglang:psa_\w+)(?:\{.*\})? (\S+)$", line) for line in lines]
        return {match[1]: float(match[2]) for match in found if match}

    before = series()
    answer = server.generate(prompts.recall(600, seed=7300).ids, max_new_tokens=NEW)
    after = series()
    psa = reads(answer)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["sglang:psa_bytes_read_total"] >= psa["bytes_read"] > 0
    assert grown["sglang:psa_bytes_dense_total"] >= psa["bytes_dense"]
    assert grown["sglang:psa_pages_attended_total"] >= psa["pages_attended"]
    assert grown["sglang:psa_decode_steps_total"] >= psa["decode_steps"]
    assert grown["sglang:psa_bytes_fraction_count"] == grown["sglang:psa_decode_steps_total"]
    stats = server.stats()
    assert after["sglang:psa_bytes_read_total"] == stats["bytes_read"]


def test_the_log_says_once_that_psa_ran(server: Server, prompts: Prompts) -> None:
    server.generate(prompts.recall(500, seed=7400).ids, max_new_tokens=4)
    server.generate(prompts.recall(500, seed=7410).ids, max_new_tokens=4)
    said = re.findall(r"PSA decoded (\d+) tokens, read ([\d.]+) % of the KV bytes", server.log)
    assert len(said) == 1
    assert int(said[0][0]) >= 1 and 0 < float(said[0][1]) < 100
    assert len(re.findall(r"psa backend ready: kernels=\w+ page_size=16", server.log)) == 1
