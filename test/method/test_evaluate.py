"""The whole command on the embedded model, against transformers' own generation."""

import json
import re

import pytest
import torch

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.evaluate import cli, policy_spec, report
from sgl_psa.evaluate.feeder import Answering, Forced
from sgl_psa.evaluate.in_process import InProcess, load_model
from sgl_psa.evaluate.interval import paired_difference
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.measurement import Measurement
from sgl_psa.evaluate.paged_model import PagedModel, Row, refuse_unfit
from sgl_psa.evaluate.results import COLUMNS, Results
from sgl_psa.evaluate.tasks import TASKS
from sgl_psa.policies import POLICIES

LENGTH = 1200
RUN_LENGTH = 1600
SPECS = ["psa:marginal:0.1", "psa:coverage:0.9"]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(cli.EMBEDDED), "float32", "cpu")


@pytest.fixture
def runner(loaded) -> InProcess:
    model, tokenizer = loaded
    return InProcess(model, tokenizer, name="embedded", folder=cli.EMBEDDED, chat=False, batch=8)


@torch.inference_mode()
def test_dense_decodes_what_transformers_generates(loaded, runner) -> None:
    """Token for token, in batches, with rows that end at different times."""
    model, tokenizer = loaded
    spec = policy_spec.parse("dense")
    example = TASKS["multi_key"].build(Material(tokenizer, RECALL), LENGTH, "exact")
    ids = runner._context_ids(example)
    model.set_attn_implementation("sdpa")
    expected = []
    for query in example.queries[:6]:
        turn = query.turns[0]
        fed = torch.tensor([ids + tokenizer(turn.question, add_special_tokens=False).input_ids])
        out = model.generate(fed, max_new_tokens=turn.max_tokens, do_sample=False)[0]
        answer = out[fed.shape[1] :].tolist()
        ends = [i for i, t in enumerate(answer) if "\n" in tokenizer.decode([t])]
        expected.append(answer[: ends[0] + 1] if ends else answer)
    paged = PagedModel(model, [spec.config], max_context=len(ids), max_rows=6, max_tail=40)
    paged.prefill(ids)
    eos = runner._eos
    rows = [
        Row(Answering(runner.prompt, query, eos), spec.rule(), len(ids))
        for query in example.queries[:6]
    ]
    paged.decode(paged.groups[0], rows)
    assert [row.feeder.tokens[0] for row in rows] == expected


@torch.inference_mode()
def test_forced_text_has_the_loss_of_a_dense_pass(loaded) -> None:
    """Spans that begin in the middle of pages, decoded dense, equal one full forward pass."""
    model, tokenizer = loaded
    example = TASKS["text"].build(Material(tokenizer, RECALL), LENGTH, "loss")
    model.set_attn_implementation("sdpa")
    logits = torch.log_softmax(model(torch.tensor([example.ids])).logits[0].float(), -1)
    paged = PagedModel(model, [PSAConfig()], max_context=LENGTH, max_rows=4, max_tail=32)
    paged.prefill(example.ids)
    rule = policy_spec.parse("dense").rule()
    rows = []
    for start, stop in [(700, 720), (1001, 1033), (1100, 1101)]:
        feeder = Forced(example.ids[start:stop], example.ids[start - 1])
        rows.append((Row(feeder, rule, start - 1), start, stop))
    for _ in range(2):
        paged.decode(paged.groups[0], [row for row, _, _ in rows])
        for row, start, stop in rows:
            exact = [-logits[i - 1, example.ids[i]].item() for i in range(start, stop)]
            assert row.feeder.losses == pytest.approx(exact, abs=2e-4)
        rows = [
            (Row(Forced(example.ids[a:b], example.ids[a - 1]), rule, a - 1), a, b)
            for _, a, b in reversed(rows)
        ]


def test_a_row_does_not_see_its_neighbours(loaded, runner) -> None:
    """Grades and reads of a policy are the same alone and among other policies."""
    _, tokenizer = loaded
    examples = [TASKS["single"].build(Material(tokenizer, RECALL), LENGTH, "alone")]
    specs = policy_spec.parse_all(SPECS)
    together = runner.measure(examples, specs, lambda n: None)
    for spec, mixed in zip(specs, together, strict=True):
        (alone,) = runner.measure(examples, [spec], lambda n: None)
        assert alone.grades == mixed.grades
        assert alone.reads.pages_attended == mixed.reads.pages_attended
        assert alone.reads.fractions() == mixed.reads.fractions()


def run(folder, *extra: str) -> list[dict]:
    arguments = ["--lengths", str(RUN_LENGTH), "--queries", "3", "--out", str(folder), *extra]
    assert cli.main(arguments) == 0
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    tasks = ["single", "long_generation", "text"]
    rows = run(folder, "--tasks", ",".join(tasks), "--policies", ",".join(SPECS))
    return folder, rows


def test_rows_have_the_stable_columns(finished) -> None:
    _, rows = finished
    assert len(rows) == 9
    for row in rows:
        assert tuple(row)[: len(COLUMNS)] == COLUMNS
        assert row["queries"] == 3 and row["length"] == RUN_LENGTH
        assert 0 < row["bytes_fraction"] <= 1 and 0 < row["pages_fraction"] <= 1
        assert row["policy"] in POLICIES
        text = row["task"] == "text"
        assert row["score"] > 1 if text else 0 <= row["score"] <= 1
        shares = [x for layer in row["pages_by_head"] for x in layer]
        mean = sum(shares) / len(shares)
        assert mean == pytest.approx(row["pages_fraction"], abs=1e-4)
    dense = [row for row in rows if row["policy"] == "dense"]
    assert all(row["bytes_fraction"] == 1 and row["score"] == row["dense_score"] for row in dense)
    assert all(row["bytes_fraction"] < 1 for row in rows if row["policy"] != "dense")
    by_task = {row["task"]: row["score"] for row in dense}
    assert all(row["dense_score"] == by_task[row["task"]] for row in rows)


def test_the_embedded_model_recalls_densely(finished) -> None:
    _, rows = finished
    score = {(row["task"], row["spec"]): row["score"] for row in rows}
    assert score["single", "dense"] == 1.0
    assert score["long_generation", "dense"] >= 2 / 3


def test_what_is_measured_is_kept(finished, tmp_path, monkeypatch) -> None:
    folder, rows = finished
    (tmp_path / "eval.json").write_text((folder / "eval.json").read_text())
    asked = []
    monkeypatch.setattr(
        InProcess,
        "measure",
        lambda self, examples, specs, progress: (
            asked.extend(s.text for s in specs)
            or [Measurement(grades=[1.0], queries=1) for _ in specs]
        ),
    )
    more = run(tmp_path, "--tasks", "single", "--policies", ",".join([*SPECS, "psa:marginal:0.3"]))
    assert asked == ["psa:marginal:0.3"]
    assert more[: len(rows)] == rows and len(more) == len(rows) + 1
    assert more[-1]["dense_score"] == rows[0]["dense_score"]
    run(tmp_path, "--tasks", "single", "--policies", SPECS[0], "--seed", "1")
    assert asked[1:] == ["dense", SPECS[0]]


def test_rows_of_another_content_of_the_model_are_forgotten(finished, tmp_path) -> None:
    folder, _ = finished
    results = Results(folder / "eval.json")
    assert results.drop_outdated("embedded", "") == 0
    assert results.drop_outdated("other", "x") == 0
    assert results.drop_outdated("embedded", results.rows[0]["fingerprint"]) == 0
    assert results.drop_outdated("embedded", "another") == 9


def test_the_report_is_one_file_with_every_policy(finished) -> None:
    folder, rows = finished
    page = (folder / "report.html").read_text()
    for row in rows:
        assert row["spec"] in page and row["curve"] in page
    assert page.count("<svg") >= 4
    assert page.count("<svg") == page.count('role="img" aria-label=')
    names = re.findall(r'<[a-z]+[^>]* id="([^"]+)"', page)
    assert len(names) == len(set(names))
    references = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in references)
    assert "<script" not in page


def test_the_report_tells_the_difference_to_dense(finished, tmp_path) -> None:
    _, rows = finished
    rows = [dict(row) for row in rows if row["task"] == "single"]
    assert all(len(row["grades"]) == 3 for row in rows)
    assert rows[1]["spec"] == SPECS[0] and rows[0]["policy"] == "dense"
    rows[1]["grades"] = [0.0, *rows[0]["grades"][1:]]
    page = report.write(rows, tmp_path).read_text()
    (line,) = re.findall(rf'<tr><th scope="row">{SPECS[0]}</th>.*', page)
    assert "-33.3 <small>" in line
    del rows[0]["grades"]
    assert "<small>-" not in report.write(rows, tmp_path).read_text()


def test_the_report_shows_the_audit_beside_it(finished, tmp_path) -> None:
    _, rows = finished
    row = {"stop": "coverage", "mode": "plain", "scorer": "sketch", "requested": 0.9}
    row |= {"achieved_mean": 0.87, "achieved_p05": 0.71, "violation_rate": 0.125, "rows": 960}
    audit = [row, {**row, "scorer": "hybrid"}, {**row, "stop": "marginal", "requested": None}]
    without = report.write(rows, tmp_path).read_text()
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    page = report.write(rows, tmp_path).read_text()
    assert page.count("<svg") == without.count("<svg") + 3
    for scorer in ("sketch", "hybrid"):
        assert f"scorer {scorer}: coverage achieved against requested" in page
        assert f'<th scope="row">{scorer}, plain</th>' in page
    assert page.count("12.5 %") == 2 and page.count('<td class="loss">0.8700</td>') == 2


def test_paired_intervals() -> None:
    """Worked by hand after Bonett and Price: one loss and no gain of ten."""
    mean, low, high = paired_difference([1.0] * 9 + [0.0], [1.0] * 10)
    assert mean == pytest.approx(-0.1)
    centre, spread = -1 / 12, 3 / 12 - 1 / 144
    half = 1.959964 * (spread / 12) ** 0.5
    assert (low, high) == pytest.approx((centre - half, centre + half))
    _, low, high = paired_difference([1.0] * 4, [1.0] * 4)
    assert low < 0 < high and -low == high
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 0.0])


def test_the_report_tells_good_scores_from_bad() -> None:
    row = {"metric": "accuracy", "dense_score": 0.95}
    assert report.within({**row, "score": 0.94}) and not report.within({**row, "score": 0.93})
    row = {"metric": "perplexity", "dense_score": 10.0}
    assert report.within({**row, "score": 10.1}) and not report.within({**row, "score": 10.2})


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("psa:marginal:0.3", "delta", 0.3),
        ("psa:coverage:0.9", "coverage", 0.9),
        ("psa:0.9:coverage:hybrid", "scorer", "hybrid"),
        ("psa:marginal:sketch:0.1:sketch_bits=1", "sketch_bits", 1),
    ],
)
def test_specs_set_their_fields(text: str, field: str, value) -> None:
    spec = policy_spec.parse(text)
    assert getattr(spec.config, field) == value
    assert spec.knob == getattr(spec.config, spec.knob_name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("pso:0.1", "did you mean 'psa'"),
        ("psa:nonsense", "is none of coverage, marginal"),
        ("psa:0.1:0.2", "'0.2' is none of"),
        ("psa:marginal:7", "delta"),
        ("dense:3", "no knob"),
        ("psa:colour=red", "unknown key 'colour'"),
    ],
)
def test_bad_specs_name_the_fix(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_spec.parse(text)


@pytest.mark.parametrize("quick", [True, False])
def test_the_default_table_covers_every_policy(quick: bool) -> None:
    specs = policy_spec.parse_all(policy_spec.default_specs(quick))
    assert {spec.policy for spec in specs} == set(POLICIES)
    assert specs[0].policy == "dense"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "nothing"], "known are single"),
        (["--tasks", "common_words"], "--style plain"),
        (["--policies", "what"], "unknown key"),
        (["--queries", "0"], "at least 1"),
        (["--server", "http://127.0.0.1:9"], "is the server running"),
    ],
)
def test_bad_arguments_end_with_one_line(tmp_path, capsys, arguments, message: str) -> None:
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_attention_that_psa_does_not_serve_is_refused(loaded) -> None:
    config = loaded[0].config
    refuse_unfit(config)
    config = type(config)(**{**config.to_dict(), "layer_types": None})
    config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        refuse_unfit(config)
