"""The HTTP runner against a stand-in server that looks answers up in the prompt it is sent."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoTokenizer

from sgl_psa.config import PSAConfig
from sgl_psa.evaluate import cli, policy_spec, server
from sgl_psa.evaluate.tasks import TASKS

TOKENIZER = AutoTokenizer.from_pretrained(cli.EMBEDDED)


class StandIn(BaseHTTPRequestHandler):
    """Answers as the embedded model should; ``requests`` holds what it was asked."""

    requests: list[dict]
    config = PSAConfig().as_dict()

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        pages = {"/psa/stats": {"config": self.config}, "/model_info": {}}
        pages["/model_info"] = {"model_path": str(cli.EMBEDDED)}
        known = self.path in pages
        self.reply(200 if known else 404, pages.get(self.path, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        text = TOKENIZER.decode(body["input_ids"], skip_special_tokens=True)
        question = re.search(r"\? ([a-z ]+)$", text)[1]
        answer = re.search(rf"^# {question}(\d+)$", text, re.M)[1]
        psa = {"decode_steps": 2, "bytes_read": 10, "bytes_dense": 100, "pages_attended": 1}
        psa |= {"pages_total": 20, "rounds": 1.5, "coverage": None}
        self.reply(200, {"text": answer, "meta_info": {"psa": psa}})

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def url():
    StandIn.requests = []
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=stand_in.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stand_in.server_port}"
    stand_in.shutdown()


def test_the_command_measures_a_server(url, tmp_path, capsys) -> None:
    tasks, policies = "single,long_generation,text", "psa:marginal:0.3,psa:coverage:0.9"
    arguments = ["--server", url, "--lengths", "1300", "--tasks", tasks, "--queries", "3"]
    assert cli.main([*arguments, "--policies", policies, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["task"], row["spec"]) for row in rows] == [
        (task, spec)
        for task in ("single", "long_generation")
        for spec in ("dense", *policies.split(","))
    ]
    for row in rows:
        assert row["score"] == 1.0 and row["queries"] == 3
        assert (row["runner"], row["model"], row["style"]) == ("server", "embedded", "recall")
        assert row["bytes_fraction"] == 0.1 and row["pages_fraction"] == 0.05
        assert row["rounds"] == 1.5 and row["coverage"] is None
    assert "measure it in process" in capsys.readouterr().out


def test_requests_carry_the_policy_and_only_its_knob(url, tmp_path) -> None:
    arguments = ["--server", url, "--lengths", "1300", "--tasks", "single", "--queries", "1"]
    policies = "psa:marginal:0.3,psa:coverage:0.9"
    assert cli.main([*arguments, "--policies", policies, "--out", str(tmp_path)]) == 0
    sent = [body["sampling_params"]["custom_params"] for body in StandIn.requests]
    assert sent == [
        {"psa_policy": "dense"},
        {"psa_policy": "psa", "psa_stop": "marginal", "psa_delta": 0.3},
        {"psa_policy": "psa", "psa_stop": "coverage", "psa_coverage": 0.9},
    ]
    assert all(body["sampling_params"]["temperature"] == 0 for body in StandIn.requests)
    first, *others = [body["input_ids"] for body in StandIn.requests]
    assert len(first) < 1300 and all(other == first for other in others)


def test_policies_that_need_other_settings_are_named(url) -> None:
    runner = server.Server(url, TOKENIZER, name="x", chat=False, parallel=1)
    spec = policy_spec.parse("psa:marginal:0.1:hybrid", runner.config)
    reason = runner.refuses(TASKS["single"], spec)
    assert reason == "the server must be started with --psa-scorer hybrid"
    assert runner.refuses(TASKS["single"], policy_spec.parse("psa:0.1", runner.config)) is None
    change = policy_spec.parse("psa:change:0.1", runner.config)
    assert runner.refuses(TASKS["single"], change) == (
        "the server must be started with --psa-stop change"
    )


def test_a_server_without_psa_is_told_apart(url, monkeypatch) -> None:
    monkeypatch.setattr(StandIn, "do_GET", lambda self: self.reply(404, {"detail": "Not Found"}))
    with pytest.raises(server.ServerError, match="--attention-backend psa"):
        server.server_config(url)
