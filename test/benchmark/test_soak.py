"""The soak on made-up servers: it ends well if nothing is wrong, and tells what is."""

import functools
import json

import pytest

from benchmark.server_process import Server
from benchmark.soak import __main__ as command
from benchmark.soak import load
from benchmark.stream_client import Answer, Ask

FAKE = "test.benchmark.fake_server"
PROMPTS = [tuple(range(n, n + 30)) for n in range(6)]


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(command, "Server", functools.partial(Server, module=FAKE))
    monkeypatch.setattr(command, "prompts", lambda seed, count: PROMPTS[:count])
    monkeypatch.setattr(command, "_PHASE_SECONDS", (0.5, 1.0))
    monkeypatch.setattr(load, "_GAPS", (0.01, 0.05))
    return lambda **extra: monkeypatch.setattr(
        command, "tiered", lambda model, host, folder: {"psa-device-pool-bytes": 1, **extra}
    )


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    status = command.main(
        ["--minutes", "0.05", "--prompts", "5", "--out", str(tmp_path), *arguments]
    )
    return status, json.loads((tmp_path / "soak.json").read_text())


def test_right_answers_and_good_books(fakes, tmp_path) -> None:
    fakes()
    status, rows = run(tmp_path)
    assert status == 0 and [row["host"] for row in rows] == ["memory", "file"]
    for row in rows:
        assert row["problems"] == [] and row["checks"] >= 1 and row["whole"] > 5
        assert row["asked"] >= row["whole"] and row["left"] + row["aborted"] > 0
        assert row["cached_tokens"] > 0 and row["loads"] > 0


def test_wrong_answers_and_bad_books(fakes, tmp_path, capsys) -> None:
    fakes(**{"psa-placement": "even"})
    status, rows = run(tmp_path, "--hosts", "memory")
    assert status == 1
    found = "\n".join(rows[0]["problems"])
    assert "wrong answer to a prompt of 30 tokens: 0 of" in found
    assert "/psa/memory/check: frame 3: no owner" in found
    assert "problem(s)" in capsys.readouterr().out


def test_a_server_that_ends_is_a_problem(tmp_path) -> None:
    server = Server("fake", [], tmp_path / "log", module=FAKE)
    server.stop()
    wanted = {(ids, rule): [1] * load.NEW_TOKENS for ids in PROMPTS for rule in load.RULES}
    tally = command.soak(server, wanted, "0", 1.0)
    assert any("ConnectionError" in text for text in tally.problems)
    assert any("wrong answer" in text and "Cannot connect" in text for text in tally.problems)


@pytest.mark.parametrize(
    ("ids", "left", "right"),
    [([1, 2, 3], False, True), ([1, 2], False, False), ([1, 2], True, True), ([1, 3], True, False)],
)
def test_answers_may_end_only_where_their_client_left(ids, left, right) -> None:
    ask = Ask((7,), 3, load.EXACT, leave_after=2 if left else None)
    answer = Answer(ask, 0.0, ids, left=left)
    tally = load.Tally()
    tally.add(answer, [1, 2, 3, 4])
    assert (tally.problems == []) == right


@pytest.mark.parametrize(
    ("rule", "meta", "ids", "problem"),
    [
        (load.EXACT, {"num_retractions": 2}, [1, 3, 3], True),
        (load.SPARSE, {"num_retractions": 0}, [1, 3, 3], True),
        (load.SPARSE, {"num_retractions": 2}, [1, 3, 3], False),
        (load.SPARSE, {"num_retractions": 2}, [1, 3], True),
        (load.SPARSE, {"num_retractions": 2}, [3, 2, 3], True),
        (load.SPARSE, {}, [1, 3, 3], False),
    ],
)
def test_only_sparse_answers_that_were_resumed_may_differ(rule, meta, ids, problem) -> None:
    tally = load.Tally()
    tally.add(Answer(Ask((7,), 3, rule), 0.0, ids, meta=meta), [1, 2, 3])
    assert bool(tally.problems) == problem and tally.resumed_otherwise == (not problem)


def test_the_seed_decides_the_prompts() -> None:
    first, again = (load.prompts(3, 8) for _ in range(2))
    assert first == again and len(set(first)) == 8
    assert all(250 <= len(ids) <= load.PROMPT_TOKENS[1] for ids in first)
    common = [sum(a == b for a, b in zip(first[0], other, strict=False)) for other in first[1:6]]
    assert max(common) > 100
