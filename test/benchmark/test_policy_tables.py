"""The ablation and length tables: which rows there are, and that they are measured once."""

import argparse
import dataclasses
import json

import pytest

from benchmark import ablation, common, length_curve, policy_runs
from benchmark.policy_runs import DENSE_CASE, Case, PolicyRuns, spec_of
from sgl_psa.config import PSAConfig
from sgl_psa.evaluate import policy_spec
from sgl_psa.evaluate.in_process import InProcess
from sgl_psa.scorers.rotated_sketch import RotatedSketchScorer
from sgl_psa.scorers.sketch import SketchScorer
from sgl_psa.stop import STOP_RULES

BASE = policy_spec.parse("psa:marginal:two_level:0.03").config
LENGTH = 1100
#: factor -> settings that may differ from the base.
MAY_DIFFER = {
    "base": set(),
    "scorer": {"scorer"},
    "bits": {"scorer", "sketch_bits"},
    "stop rule": {"stop", "conservative"},
    "pages in a group": {"group_pages"},
    "candidate pages": {"candidate_pages"},
    "page size": {"sink_pages", "recent_pages", "group_pages", "candidate_pages", "budget_pages"},
    "query heads select": set(),
    f"best {ablation.BUDGET} pages by": {"policy", "scorer", "budget_pages"},
    **{factor: {name} for factor, name in ablation.SWITCHES.items()},
}


def entries(base: PSAConfig = BASE) -> list[ablation.Entry]:
    return [row for row in ablation.table(base) if isinstance(row, ablation.Entry)]


def missing() -> list[ablation.Missing]:
    return [row for row in ablation.table(BASE) if isinstance(row, ablation.Missing)]


def test_rows_change_one_factor() -> None:
    for row in entries()[1:]:
        settings = row.case.spec.config.as_dict().items()
        differ = {name for name, value in settings if value != getattr(BASE, name)}
        assert differ <= MAY_DIFFER[row.factor], row
    factors = [row.factor for row in entries()]
    for factor in ("scorer", "bits", "stop rule", "pages in a group", "page size"):
        bases = [r for r in entries() if r.factor == factor and r.case == Case(spec_of(BASE))]
        assert len(bases) == 1 and factors.count(factor) > 2


def test_every_stop_rule_has_a_row() -> None:
    stops = {row.case.spec.config.stop for row in entries() if row.factor == "stop rule"}
    assert stops == set(STOP_RULES)
    assert any(row.case.spec.config.conservative for row in entries())


def test_texts_name_their_settings_in_full() -> None:
    for row in entries():
        assert policy_spec.parse(row.case.spec.text).config == row.case.spec.config


def test_a_factor_that_does_not_exist_is_named(monkeypatch) -> None:
    switches = {"correction": "conservative", "dreams": "dream"}
    monkeypatch.setattr(ablation, "SWITCHES", switches)
    assert [r.value for r in entries() if r.factor == "correction"] == ["off", "on"]
    assert "dream" in next(m.reason for m in missing() if m.factor == "dreams")
    refused = next(m for m in missing() if m.value == "two_level 1")
    assert "sketch_bits" in refused.reason
    row = {"factor": "f", "value": "v", "is_base": True, "scores": {"single": 0.5}, "rounds": 1.0}
    shares = dict.fromkeys(("bytes_fraction", "scored_fraction", "pages_fraction"), 0.25)
    text = ablation.markdown([row | shares], missing(), ["single"])
    assert "| f | v (base) | 0.250 | 0.250 | 0.250 | 1.00 | 0.50 |" in text
    assert "* dreams: no setting 'dream'" in text


@pytest.mark.parametrize("size, sink, recent, group", [(8, 2, 4, 8), (32, 1, 1, 2), (64, 1, 1, 1)])
def test_pages_become_as_many_tokens(size: int, sink: int, recent: int, group: int) -> None:
    found = ablation.same_tokens(BASE, size)
    assert (found["sink_pages"], found["recent_pages"], found["group_pages"]) == (
        sink,
        recent,
        group,
    )
    assert found["candidate_pages"] * size == BASE.candidate_pages * 16


@pytest.fixture
def asked(tmp_path, monkeypatch) -> argparse.Namespace:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    monkeypatch.setattr(length_curve, "RESULTS", tmp_path)
    return argparse.Namespace(
        tasks="single,text", queries=2, seed=0, batch=8, rows=tmp_path / "rows.json"
    )


def test_cases_are_measured_once(asked, monkeypatch) -> None:
    runs = PolicyRuns(asked)
    spec = policy_spec.parse("psa:marginal:0.1")
    cases = [Case(spec), Case(spec, page_size=32), Case(spec, share_heads=False)]
    runs.measure(cases, LENGTH)
    rows = json.loads(asked.rows.read_text())
    assert len(rows) == 2 * (len(cases) + 1)
    one, pages, apart = (runs.summary(case, LENGTH) for case in cases)
    assert one["bytes_fraction"] < pages["bytes_fraction"] < 1
    assert 1.5 < apart["scored_fraction"] / one["scored_fraction"] < 2.5
    assert one["dense_scores"] == runs.summary(DENSE_CASE, LENGTH)["scores"]
    assert apart["dense_scores"] == pages["dense_scores"] == one["dense_scores"]

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(InProcess, "measure", fail)
    PolicyRuns(asked).measure(cases, LENGTH)
    with pytest.raises(AssertionError, match="measured again"):
        PolicyRuns(asked).measure([Case(policy_spec.parse("psa:marginal:0.3"))], LENGTH)


def test_the_scripts_write_their_files(asked, tmp_path, monkeypatch, capsys) -> None:
    kept = [row for row in ablation.table(BASE) if row.factor in ("dense", "base")]
    gap = ablation.Missing("dreams", "", "none")
    monkeypatch.setattr(ablation, "table", lambda base, prior: [*kept, gap])
    shared = ["--tasks", asked.tasks, "--queries", "2", "--rows", str(asked.rows)]
    ablation.main([*shared, "--length", str(LENGTH)])
    policy = "psa:marginal:two_level:0.03"
    length_curve.main(
        [*shared, "--lengths", str(LENGTH), "--policies", policy, "--scored-lengths", "2048"]
    )
    names = {path.name for path in tmp_path.iterdir()}
    curves = {f"length_curve_{part}.png" for part in ("fraction", "bytes", "scoring")}
    assert {"ablation.json", "ablation.md", "ablation.png", "length_curve.md"} | curves <= names
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["factor"] for row in table["rows"]] == ["dense", "base"]
    assert table["missing"] == [gap._asdict()]
    assert (tmp_path / "ablation.md").read_text() in capsys.readouterr().out
    curve = json.loads((tmp_path / "length_curve.json").read_text())["rows"]
    assert [row["policy"] for row in curve] == ["dense", policy]
    # Both scripts measure the same policy on the same contexts, once.
    assert curve[1]["bytes_fraction"] == table["rows"][1]["bytes_fraction"]
    assert len(json.loads(asked.rows.read_text())) == 4
    assert curve[1]["attended_fraction"] + curve[1]["scored_fraction"] == pytest.approx(
        curve[1]["bytes_fraction"], abs=1e-5
    )


@pytest.mark.parametrize("length", [2048, 20000])
def test_bytes_to_score_are_those_of_every_page_or_of_candidates(length: int) -> None:
    pages, dim = length // 16, 128
    sketch = length_curve.scored_bytes(PSAConfig(scorer="sketch", sketch_bits=4), length, dim)
    assert sketch == pages * SketchScorer.page_bytes(16, dim, 4)
    first, second = (RotatedSketchScorer.page_bytes(16, dim, bits) for bits in (1, 2))
    config = PSAConfig(scorer="two_level", candidate_pages=64)
    assert length_curve.scored_bytes(config, length, dim) == pages * first + 64 * second


def test_options_of_the_scripts() -> None:
    assert ablation.parse([]).queries == 100 and ablation.parse([]).length == 8192
    assert length_curve.parse([]).tasks == policy_runs.FAST_TASKS
    names = {field.name for field in dataclasses.fields(PSAConfig)}
    assert set(ablation._COUNT_PAGES) == {n for n in names if n.endswith("_pages")}
