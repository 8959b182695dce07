"""The engine benchmark without an engine: its arithmetic, and that its arguments exist."""

import argparse
import dataclasses

import pytest

from benchmark.gpu import serving
from sgl_psa.config import PSAConfig, fields
from sgl_psa.static_plan import check


class Engine:
    """Answers in 10 ms, and 2 ms a token of the longest request."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def generate(self, input_ids, sampling_params):
        tokens = sampling_params["max_new_tokens"]
        self.calls.append((len(input_ids), len(input_ids[0]), tokens))
        self.now += 0.01 + 0.002 * tokens
        return [{"meta_info": {"psa": {"bytes_fraction": 0.25}}} for _ in input_ids]


def test_a_step_is_the_slope_between_two_output_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr(serving.time, "perf_counter", lambda: engine.now)
    options = argparse.Namespace(vocabulary=100, new_tokens=8, rounds=3)
    row = serving.measure(engine, 50, 2, options)
    assert row["step_ms"]["median"] == pytest.approx(2.0) and row["step_ms"]["runs"] == 3
    assert row["bytes_fraction"] == 0.25
    assert engine.calls[:2] == [(2, 50, 8)] * 2
    assert engine.calls[2:] == [(2, 50, 8), (2, 50, 32)] * 3


def test_variants_name_real_arguments_and_settings_that_can_be_captured() -> None:
    from sglang_psa.compat import ServerArgs

    known = {f.name for f in dataclasses.fields(ServerArgs)}
    settings = {f"psa_{f.name}" for f in fields()}
    for name, arguments in {**serving.VARIANTS, **serving.TINY_VARIANTS}.items():
        assert set(arguments) <= known | settings, name
        config = PSAConfig(
            **{k.removeprefix("psa_"): v for k, v in arguments.items() if k in settings}
        )
        if arguments.get("cuda_graph_backend_decode") == "full":
            check(config, config.backend)
