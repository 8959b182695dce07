"""SGLang's own load generator against a psa server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from test.server.process import Server, environment

pytestmark = pytest.mark.server

RANDOM = "--random-input-len 400 --random-output-len 8 --random-range-ratio 1.0 --num-prompts 10"
SHARED = (
    "--gsp-num-groups 2 --gsp-prompts-per-group 5 --gsp-system-prompt-len 400 "
    "--gsp-question-len 60 --gsp-output-len 8"
)


@pytest.mark.parametrize(
    ("dataset", "options"), [("random-ids", RANDOM), ("generated-shared-prefix", SHARED)]
)
def test_all_requests_complete(
    server: Server, model: Path, tmp_path: Path, dataset: str, options: str
) -> None:
    before = server.stats()
    host, port = server.url.removeprefix("http://").split(":")
    output = tmp_path / "bench.jsonl"
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--host", host, "--port", port, "--model", str(model), "--tokenizer", str(model)]
    command += ["--dataset-name", dataset, *options.split(), "--request-rate", "inf"]
    command += ["--disable-tqdm", "--output-file", str(output)]
    done = subprocess.run(
        command,
        env={**environment(), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(output.read_text().splitlines()[-1])
    assert report["completed"] == 10
    assert report["total_output_tokens"] == 80
    after = server.stats()
    assert after["sparse_rows"] - before["sparse_rows"] >= 10 * 7
    assert after["bytes_read"] - before["bytes_read"] < after["bytes_dense"] - before["bytes_dense"]
    server.assert_no_leak()
