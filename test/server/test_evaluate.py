"""``python -m sgl_psa.evaluate --server`` against a real server."""

import json
from pathlib import Path

import pytest

from sgl_psa.evaluate import cli
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
