"""Starts that must fail: before any weights are loaded, with a message that says what to change."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test.server.process import environment

pytestmark = pytest.mark.server

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
#: Folder name -> config.json of a model that psa must refuse.
MODELS: dict[str, dict[str, Any]] = {
    "latent": {
        **LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "windowed": {
        **LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1024,
    },
    "some_windowed": {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
#: Name -> flags after ``--model-path MODEL --attention-backend psa``, and the message as a regex.
CASES: dict[str, tuple[str, str]] = {
    "page size 24": ("--page-size 24", r"--page-size must be a power of two.*use 16, 32 or 64"),
    "page size 0": ("--page-size 0", r"--page-size must be a power of two"),
    "page size 1": ("--page-size 1", r"--page-size must be a power of two from 8"),
    "chunk of no whole pages": (
        "--page-size 16 --chunked-prefill-size 100",
        r"chunked_prefill_size must be divisible by page_size",
    ),
    "coverage 0": (
        "--psa-coverage 0",
        r"--psa-coverage: value='0': expected a number > 0 and <= 1",
    ),
    "coverage above 1": ("--psa-coverage 1.5", r"--psa-coverage: value='1.5': expected a number"),
    "coverage NaN": ("--psa-coverage nan", r"--psa-coverage: value='nan': expected a number"),
    "coverage text": ("--psa-coverage high", r"--psa-coverage: value='high': expected a number"),
    "delta 1": ("--psa-delta 1", r"--psa-delta: value='1': expected a number >= 0 and < 1"),
    "policy": ("--psa-policy quest", r"--psa-policy: value='quest': expected one of psa, dense"),
    "scorer": ("--psa-scorer magic", r"expected one of sketch, hybrid"),
    "sketch bits": ("--psa-sketch-bits 3", r"expected one of 1, 2, 4"),
    "misspelt key in JSON": (
        '--psa-config {"covrage":0.9}',
        r"unknown key 'covrage'; did you mean 'coverage'",
    ),
    "broken JSON": ("--psa-config {", r"--psa-config is not valid JSON"),
    "speculative decoding": (
        "--speculative-algorithm EAGLE --speculative-draft-model-path MODEL",
        r"psa and speculative decoding: .*drop --speculative-algorithm",
    ),
    "n-gram speculation": (
        "--speculative-algorithm NGRAM",
        r"psa and speculative decoding: .*drop --speculative-algorithm",
    ),
    "fp8 KV": ("--kv-cache-dtype fp8_e5m2", r"psa and KV cache dtype: .*--kv-cache-dtype auto"),
    "mixed chunk": ("--enable-mixed-chunk", r"psa and mixed chunk: .*drop --enable-mixed-chunk"),
    "hierarchical cache": ("--enable-hierarchical-cache", r"drop --enable-hierarchical-cache"),
    "pipeline": ("--pp-size 2", r"use --tp-size instead of --pp-size"),
    "one tier": ("--psa-device-pool-bytes 1M", r"set host_pool_bytes too, or drop"),
    "a tier of text": (
        "--psa-device-pool-bytes much --psa-host-pool-bytes 64M",
        r"--psa-device-pool-bytes: value='much': expected .* of bytes, or such as 512M",
    ),
    "device tier too small": (
        "--psa-device-pool-bytes 64K --psa-host-pool-bytes 64M",
        r"device_pool_bytes=65536: .*set device_pool_bytes to \d+ or more",
    ),
    "host tier too small": (
        "--psa-device-pool-bytes 512K --psa-host-pool-bytes 512K",
        r"host_pool_bytes=524288: .*set host_pool_bytes to \d+ or more",
    ),
    "pages that are not full on the device tier": (
        "--psa-device-pool-bytes 1M --psa-host-pool-bytes 64M --psa-host-dtype int8 "
        "--max-running-requests 16",
        r"16 requests that run at once .*, --max-running-requests to \d+ or less, or host_dtype",
    ),
    "host tier larger than the machine": (
        "--psa-device-pool-bytes 1M --psa-host-pool-bytes 1000000G",
        r"bytes of memory, the machine has .* or set host_path to a folder",
    ),
    "no folder for the host tier": (
        "--psa-device-pool-bytes 1M --psa-host-pool-bytes 64M --psa-host-path /proc/none",
        r"host_path='/proc/none': no file can be made there",
    ),
    "audit of two tiers": (
        "--psa-device-pool-bytes 1M --psa-host-pool-bytes 64M --psa-audit-rate 0.1",
        r"set audit_rate to 0, or drop device_pool_bytes",
    ),
    "other prefill over two tiers": (
        "--psa-device-pool-bytes 1M --psa-host-pool-bytes 64M "
        "--prefill-attention-backend torch_native --decode-attention-backend psa",
        r"psa and two tiers and prefill: .*use --attention-backend psa alone",
    ),
}
MODEL_CASES = {
    "latent": r"psa and MLA model: .*serve it without --attention-backend psa",
    "windowed": r"psa and sliding-window model: .*serve it without --attention-backend psa",
    "some_windowed": r"psa and sliding-window model: .*serve it without --attention-backend psa",
}


@pytest.fixture(scope="module")
def outcomes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Name of a case -> what happened and what was said."""
    folder = tmp_path_factory.mktemp("models")
    argvs = {
        name: ["--model-path", str(model), "--attention-backend", "psa", *given.split()]
        for name, (given, _) in CASES.items()
    }
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        argvs[name] = ["--model-path", str(folder / name), "--load-format", "dummy"]
        argvs[name + " dense"] = [*argvs[name], "--attention-backend", "torch_native"]
        argvs[name] += ["--attention-backend", "psa"]
    argvs["plain"] = ["--model-path", str(model), "--attention-backend", "psa"]
    argvs["idle flag"] = ["--model-path", str(model), "--psa-coverage", "0.9"]
    given = [[str(model) if word == "MODEL" else word for word in argv] for argv in argvs.values()]
    probe = str(Path(__file__).with_name("start_probe.py"))
    done = subprocess.run(
        [sys.executable, probe, json.dumps(given)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: tuple(pair) for name, pair in zip(argvs, found, strict=True)}


def test_a_plain_command_is_accepted(outcomes: dict[str, tuple[str, str]]) -> None:
    assert outcomes["plain"] == ("ok", "")


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    outcome, message = outcomes[name]
    assert outcome != "ok"
    assert re.search(CASES[name][1], message, re.DOTALL), (outcome, message)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_models_that_psa_cannot_run(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    outcome, message = outcomes[name]
    assert outcome == "StartUpError", message
    assert re.search(MODEL_CASES[name], message), message


@pytest.mark.parametrize("name", MODEL_CASES)
def test_other_backends_may_serve_them(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    outcome, message = outcomes[name + " dense"]
    assert "psa" not in message, (outcome, message)


def test_a_psa_flag_without_psa(outcomes: dict[str, tuple[str, str]]) -> None:
    outcome, message = outcomes["idle flag"]
    assert outcome == "StartUpError"
    assert "--psa-coverage: no effect without --attention-backend psa" in message


@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_a_bad_model_folder_ends_the_command(tmp_path: Path, kind: str) -> None:
    """A real command: one line, no traceback, an exit status, nothing left running."""
    folder = tmp_path / "model"
    if kind == "corrupt":
        folder.mkdir()
        (folder / "config.json").write_text('{"architectures": ["Llama')
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder)]
    done = subprocess.run(
        [*command, "--attention-backend", "psa", "--host", "127.0.0.1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    wanted = {"missing": "does not exist: pass --model-path", "corrupt": "cannot be read as JSON"}
    line = done.stderr.strip().splitlines()[-1]
    assert str(folder) in line and wanted[kind] in line
