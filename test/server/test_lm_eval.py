"""lm-eval asks the server through ``/v1/completions``, by the command that the README gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_psa.evaluate import lm_eval_task
from test.server.process import REQUEST_SECONDS, Server

pytestmark = pytest.mark.server
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sgl-psa[eval]'")

LENGTH, QUERIES = 1600, 6


def test_a_local_task_is_measured(server: Server, model: Path, tmp_path: Path) -> None:
    """The embedded model answers whole prompts, and the server reads less than all."""
    task = ["--length", str(LENGTH), "--queries", str(QUERIES), "--out", str(tmp_path)]
    assert lm_eval_task.main(task) == 0
    before = server.stats()
    arguments = {
        "model": "recall",
        "tokenizer": str(model),
        "base_url": f"{server.url}/v1/completions",
        "max_length": LENGTH + 2,
        "add_bos_token": True,
        "num_concurrent": 3,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--include_path", str(tmp_path), "--tasks", "psa_single", "--log_samples"]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        command,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=2 * REQUEST_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["psa_single"]
    assert scores["exact_match,none"] >= 0.75, scores
    (samples,) = (tmp_path / "out").rglob("samples_psa_single_*.jsonl")
    assert len(samples.read_text().splitlines()) == QUERIES
    after = server.stats()
    read, dense = (after[k] - before[k] for k in ("bytes_read", "bytes_dense"))
    assert 0 < read < 0.9 * dense
