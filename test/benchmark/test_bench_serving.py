"""The serving benchmark: its rows, what happens to systems that fail, and its random model."""

import json
import sys

import pytest
import torch

from benchmark.serving import __main__ as command
from benchmark.serving import random_llama, rounds, worker
from benchmark.serving.cases import DEFAULT, QUICK, RECALL, Case, model, prompts
from benchmark.serving.systems import SYSTEMS, System, vllm_missing

FAKE = "test.benchmark.fake_engine"
ROW = {
    "system",
    "model",
    "context",
    "batch",
    "decode_ms_median",
    "decode_tok_s",
    "prefill_s",
    "psa_bytes_fraction",
}
CASES = (Case(RECALL, 256, 1, 2), Case(RECALL, 256, 2, 1))


@pytest.fixture
def fakes(monkeypatch):
    systems = (
        System("plain", FAKE),
        System("sparse", FAKE, {"meta": {"bytes_fraction": 0.25}}),
        System("stillborn", FAKE, {"broken": "start"}),
        System("short", FAKE, {"broken": "answer"}),
    )
    monkeypatch.setattr(command, "SYSTEMS", systems)
    monkeypatch.setattr(command, "DEFAULT", CASES)
    return systems


@pytest.mark.parametrize("alone", [False, True])
def test_rows_of_all_systems_that_answer(fakes, alone, tmp_path, monkeypatch, capsys) -> None:
    if alone:
        monkeypatch.setattr(rounds, "together", lambda model, cases, systems: [])
    command.main(["--out", str(tmp_path), "--new-tokens", "6", "--threads", "2"])
    found = json.loads((tmp_path / "bench_serving.json").read_text())
    keys = {(row["system"], row["batch"]): row for row in found}
    assert set(keys) == {(name, batch) for name in ("plain", "sparse") for batch in (1, 2)}
    for (name, batch), row in keys.items():
        assert set(row) >= ROW and row["threads"] == 2 and row["version"].endswith(" 2")
        assert row["decode_tok_s"] == pytest.approx(batch * 1e3 / row["decode_ms_median"])
        assert row["psa_bytes_fraction"] == (0.25 if name == "sparse" else None)
        assert (row["rounds"], row["steps"]) == ((2, 8) if batch == 1 else (1, 4))
    said = capsys.readouterr().out
    assert "stillborn LEFT OUT" in said and "no such engine" in said
    assert "short LEFT OUT" in said and "ValueError: too long" in said
    assert (tmp_path / "bench_serving.md").read_text() in said


@pytest.mark.parametrize(
    ("flag", "value", "match"),
    [
        ("--models", "embedded", "no embedded; there are recall, random_llama"),
        ("--systems", "psa,sgl_psa", "no psa; there are sglang_torch_native, "),
        ("--contexts", "7", "leave nothing of recall 1024 x 1, "),
    ],
)
def test_a_choice_of_nothing_is_an_error(flag, value, match, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), flag, value])
    assert match in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_finished_cases_are_kept(fakes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "SYSTEMS", fakes[:2])
    arguments = ["--out", str(tmp_path), "--new-tokens", "6"]
    command.main([*arguments, "--batches", "1"])
    first = json.loads((tmp_path / "bench_serving.json").read_text())
    command.main([*arguments, "--resume"])
    both = json.loads((tmp_path / "bench_serving.json").read_text())
    assert [row["batch"] for row in both] == [1, 1, 2, 2] and both[:2] == first


def test_steps_count_once_all_requests_have_two_tokens() -> None:
    def generate(asked, new_tokens):
        for tokens in (0, 0, 1, 1, 2, 4, 5):
            yield worker.Progress(tokens, {"bytes_fraction": tokens})

    found = worker.timed(generate, [[1]], 5)
    assert len(found["steps_ms"]) == 2 and found["prefill_s"] > 0
    assert found["meta"] == {"bytes_fraction": 5}


def test_a_missing_vllm_is_told() -> None:
    assert "make vllm-env" in (vllm_missing(None) or "")
    assert "cannot import vllm" in (vllm_missing(sys.executable) or "")
    assert vllm_missing("/nowhere/python")


def test_all_systems_get_the_same_new_prompts() -> None:
    case = CASES[1]
    first, again, other = (prompts(case, (300, 4000), 6, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(ids) for ids in first] == [250, 250] and first[0] != first[1]
    assert {s.name for s in SYSTEMS} == {
        "sglang_torch_native",
        "sgl_psa_dense",
        "sgl_psa",
        "vllm_cpu",
    }
    assert len(set(DEFAULT)) == len(DEFAULT) and all(c.model == RECALL for c in QUICK)


def test_engines_share_the_memory_that_there_is(tmp_path) -> None:
    recall = model(RECALL, tmp_path)
    assert recall.kv_bytes == 5 * 2 * 2 * 128 * 2
    huge = Case(RECALL, 10**9, 1, 1)
    assert huge not in rounds.together(recall, [CASES[0], huge], 4)


def test_the_random_model_is_sharp() -> None:
    made = random_llama.weights(layers=1)
    layer = sum(t.numel() for name, t in made.items() if "layers.0." in name)
    rest = sum(t.numel() for t in made.values()) - layer
    assert 220e6 < random_llama.LAYERS * layer + rest < 230e6
    x = torch.randn(64, random_llama.HIDDEN, generator=torch.Generator().manual_seed(0))
    q, k = (
        (x @ made[f"model.layers.0.self_attn.{name}_proj.weight"].float().T)
        .unflatten(1, (-1, random_llama.DIM))
        .transpose(0, 1)
        for name in "qk"
    )
    logits = q[: len(k)] @ k.transpose(1, 2) / random_llama.DIM**0.5
    assert float(logits.std()) == pytest.approx(random_llama.LOGIT_STD, rel=0.1)
