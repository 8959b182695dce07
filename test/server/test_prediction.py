"""A server that predicts: it reads the file of the calibration; prefixes hand their state on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import reads
from test.server.conftest import COMMON, PSA, flags, running
from test.server.process import START_SECONDS, Server, environment
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW = 24


@pytest.fixture(scope="module")
def prior(logs: Path) -> Path:
    """A quick calibration of the embedded model, by the command that users run."""
    path = logs / "prior.json"
    command = [sys.executable, "-m", "sgl_psa.calibrate", "--out", str(path)]
    quick = ["--lengths", "512,1024", "--contexts", "1", "--steps", "8"]
    done = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "1024 tokens: one round suffices cold" in done.stdout
    return path


@pytest.fixture(scope="module")
def predicting(model: Path, logs: Path, prior: Path) -> Iterator[Server]:
    options = {"model_path": model, "psa_predict": True, "psa_budget_prior": prior}
    more = {"max_total_tokens": 32768, "enable_metrics": True}
    with running(
        Server("predicting", flags(**options, **more, **COMMON, **PSA), logs / "predicting.log")
    ) as process:
        yield process


def test_a_shared_prefix_hands_its_state_on_until_a_flush(
    predicting: Server, prompts: Prompts
) -> None:
    context, values = prompts.context(1500, seed=9000)
    first, second, third = (
        prompts.ask(context, key, value).ids for key, value in list(values.items())[:3]
    )

    def answered(ids: list[int]) -> tuple[dict, int]:
        answer = predicting.generate(ids, max_new_tokens=NEW, ignore_eos=True)
        return answer, predicting.stats()["inherited"]

    predicting.flush()
    cold, none = answered(first)
    warm, once = answered(second)
    predicting.flush()
    _, still = answered(third)
    assert (none, once, still) == (0, 1, 1)
    assert warm["meta_info"]["cached_tokens"] > 1000
    assert reads(cold)["one_round"] is not None


def test_one_round_is_reported_everywhere(predicting: Server, prompts: Prompts) -> None:
    answer = predicting.generate(
        prompts.recall(1200, seed=9100).ids, max_new_tokens=NEW, ignore_eos=True
    )
    assert 0.5 < reads(answer)["one_round"] <= 1
    predicting.wait_idle()
    stats = predicting.stats()
    assert stats["one_round"] == stats["one_round_terms"] / stats["stopped"]
    assert sum(layer["stopped"] for layer in stats["layers"]) == stats["stopped"] > 0
    text = predicting.get("/metrics").text
    counted = [line.split()[-1] for line in text.splitlines() if "psa_one_round_total{" in line]
    assert [float(x) for x in counted] == [stats["one_round_terms"]]


def test_the_log_names_what_differs_from_the_calibration(predicting: Server, prior: Path) -> None:
    """The calibration ran with the settings of the server, so there is nothing to name."""
    assert f'"pages": [{512 // 16}, {1024 // 16}]' in prior.read_text()
    assert "was made with" not in predicting.log
    predicting.assert_no_leak()


def test_a_prior_of_another_model_is_refused(model: Path, prior: Path, tmp_path: Path) -> None:
    document = json.loads(prior.read_text())
    document["log_needed"] = [length[:-1] for length in document["log_needed"]]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(document))
    options = {"model_path": model, "psa_predict": True, "psa_budget_prior": wrong}
    command = [sys.executable, "-m", "sglang.launch_server", *flags(**options, **COMMON, **PSA)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=START_SECONDS
    )
    assert done.returncode != 0
    assert "sgl-psa: error: budget prior" in done.stderr and "the model has" in done.stderr
    assert "Traceback" not in done.stderr
