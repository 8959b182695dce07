"""``python -m sgl_psa.evaluate --server`` against a real server."""

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sgl_psa.evaluate import cli
from sgl_psa.evaluate import server as runner
from test.server.process import Server

pytestmark = pytest.mark.server


def test_policies_are_measured_over_http(server: Server, tmp_path: Path) -> None:
    """The same contexts as in process; the embedded model answers, and sparse reads less."""
    tasks, policies = ["single", "long_generation"], ["psa:marginal:0.1", "psa:coverage:0.9"]
    arguments = ["--server", server.url, "--lengths", "1600", "--queries", "4"]
    arguments += ["--tasks", ",".join(tasks), "--policies", ",".join(policies)]
    assert cli.main([*arguments, "--model", str(cli.EMBEDDED), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "eval.json").read_text())
    assert [(r["task"], r["spec"]) for r in rows] == [
        (task, spec) for task in tasks for spec in ["dense", *policies]
    ]
    for row in rows:
        assert row["queries"] == 4 and row["score"] >= 0.75
        dense = row["policy"] == "dense"
        assert row["bytes_fraction"] == 1 if dense else 0 < row["bytes_fraction"] < 0.9


def test_plain_prompts_are_those_of_the_chat_api(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids that are sent are the message as the server's own template renders it."""
    sent, post = [], runner.post
    monkeypatch.setattr(
        runner, "post", lambda url, body: sent.append(copy.deepcopy(body)) or post(url, body)
    )
    arguments = ["--server", server.url, "--lengths", "1600", "--queries", "1", "--tasks", "single"]
    arguments += ["--model", str(cli.EMBEDDED), "--style", "plain", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--policies", "psa:marginal:0.1"]) == 0
    assert all(row["style"] == "plain" for row in json.loads((tmp_path / "eval.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(cli.EMBEDDED)
    ids = sent[0]["input_ids"]
    assert all(body["input_ids"] == ids for body in sent) and ids.count(tokenizer.bos_token_id) == 1
    message = tokenizer.decode(ids, skip_special_tokens=True)
    asked = {"model": "recall", "messages": [{"role": "user", "content": message}]}
    answer = server.post("/v1/chat/completions", {**asked, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == pytest.approx(len(ids), abs=2)
