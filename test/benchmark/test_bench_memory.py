"""The memory benchmark on made-up servers: its traces, its arithmetic, its rows."""

import asyncio
import functools
import json

import pytest

from benchmark import stream_client
from benchmark.memory import __main__ as command
from benchmark.memory import measure, rounds, traces
from benchmark.memory.cases import DEFAULT, QUICK, Case
from benchmark.memory.systems import (
    PAGE_SIZE,
    QUARTER,
    RESIDENT,
    SAME_BYTES,
    VARIANTS,
    Model,
    System,
    flags,
    kv_bytes,
    sizes,
)
from benchmark.memory.traces import Pass, Trace
from benchmark.server_process import Server
from benchmark.stream_client import ABORT, DISCONNECT, Answer, Ask

FAKE = "test.benchmark.fake_server"
COLUMNS = {
    "arena_fraction",
    "placement",
    "pipeline",
    "host_kind",
    "concurrency",
    "requests",
    "request_throughput",
    "decode_tok_s",
    "ttft_p50",
    "ttft_p99",
    "bytes_loaded",
    "bytes_in_vain",
    "hit_rate",
    "outputs_equal_resident",
}
EVEN = System("even", 0.25, "even")
BROKEN = System("broken", 0.25, "lru")
REFUSING = System("refusing", 0.25, host="file")


def small(writer: traces.Writer) -> Trace:
    asks = [Ask(tuple(range(n, n + 40)), 12) for n in range(8)]
    warm = Pass("warm", tuple(asks[:4]), 2, 2, False)
    return Trace("small", (Pass("cold", tuple(traces.leaving(asks, 3)), 4, 1, True), warm))


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(rounds, "Server", functools.partial(Server, module=FAKE))
    groups = ((RESIDENT, QUARTER), (EVEN, BROKEN, REFUSING))
    monkeypatch.setattr(command, "DEFAULT", (Case("small", small, groups),))


def test_rows_of_all_servers_that_answer(fakes, tmp_path, capsys) -> None:
    assert command.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "bench_memory.json").read_text())
    rows = {(row["system"], row["trace"]): row for row in found}
    assert set(rows) == {
        (system.name, name)
        for system in (RESIDENT, QUARTER, EVEN, REFUSING)
        for name in ("cold", "warm")
    }
    for (name, trace), row in rows.items():
        assert set(row) >= COLUMNS
        assert row["outputs_equal_resident"] == (name in (RESIDENT.name, QUARTER.name))
        assert (row["requests"], row["rounds"]) == ((8, 1) if trace == "cold" else (4, 2))
    quarter = rows[QUARTER.name, "warm"]
    assert quarter["bytes_loaded"] == 2 * quarter["bytes_in_vain"] == 2 * 1000 * 2 * 4 * 12
    assert quarter["hit_rate"] == pytest.approx(0.9)
    assert (quarter["placement"], rows[EVEN.name, "warm"]["placement"]) == ("uneven", "even")
    assert rows[RESIDENT.name, "warm"]["bytes_loaded"] is None
    assert rows[REFUSING.name, "warm"]["errors"][0].startswith("HTTP 503: ")
    said = capsys.readouterr().out
    assert "broken LEFT OUT" in said and "no such placement" in said
    assert (tmp_path / "bench_memory.md").read_text() in said
    assert (tmp_path / "bench_memory.png").stat().st_size > 1000


def test_finished_servers_are_kept(fakes, tmp_path, monkeypatch) -> None:
    arguments = ["--out", str(tmp_path), "--systems", f"{RESIDENT.name};{QUARTER.name}"]
    assert command.main(arguments) == 0
    path = tmp_path / "bench_memory.json"
    first = json.loads(path.read_text())
    monkeypatch.setattr(rounds, "Server", None)
    assert command.main([*arguments, "--resume"]) == 0
    assert json.loads(path.read_text()) == first


def test_clients_leave_in_either_way(tmp_path) -> None:
    server = Server("fake", [], tmp_path / "log", module=FAKE)
    try:
        asks = [
            Ask((1, 2, 3), 50, leave_after=5, leave_by=DISCONNECT),
            Ask((1, 2, 3), 50, leave_after=5, leave_by=ABORT),
            Ask((1, 2, 3), 6),
            Ask((1, 2, 3), 50, leave_after=0),
        ]
        answers = asyncio.run(stream_client.closed_loop(server.url, asks, 4, "x"))
        server.wait_idle()
    finally:
        server.stop()
    assert [answer.error for answer in answers] == [""] * 4
    assert [answer.left for answer in answers] == [True, True, False, True]
    assert len(answers[0].ids) == 5 and 5 <= len(answers[1].ids) < 50
    assert answers[2].whole and answers[2].ids == [6, 7, 8, 9, 10, 11]
    assert not answers[3].ids


def answer(sent, *arrivals, new=4, left=False) -> Answer:
    ids = list(range(arrivals[-1][1]))
    return Answer(Ask((sent,), new), sent, ids, list(arrivals), arrivals[-1][0], left)


def test_decode_counts_while_nobody_waits() -> None:
    first = answer(0, (2.0, 1), (3.0, 2), (5.5, 3), (6.0, 4))
    second = answer(1, (4.0, 1), (5.0, 2), (6.0, 3), (7.0, 4))
    # Somebody waits until 4.0; then 2 and 3 tokens come in 3 seconds.
    assert measure.decode_rate([first, second]) == pytest.approx(5 / 3)
    assert measure.decode_rate([answer(0, (2.0, 1)), answer(1, (2.0, 1))]) is None


def test_answers_are_compared_up_to_where_a_client_left() -> None:
    wanted = {(0,): [0, 1, 2, 3]}
    whole = answer(0, (1.0, 4))
    assert measure.equal([whole], wanted)
    assert not measure.equal([whole], {(0,): [0, 1, 2, 4]})
    assert not measure.equal([whole], {})
    assert not measure.equal([answer(0, (1.0, 3))], wanted)
    left = answer(0, (1.0, 3), left=True)
    object.__setattr__(left.ask, "leave_after", 2)
    assert measure.equal([left], {(0,): [0, 1]})
    assert not measure.equal([left], {(0,): [0, 2]})


def test_shared_prefixes_are_held_once() -> None:
    shared = list(range(64))
    prompts = [[*shared, *range(100, 140)], [*shared, *range(200, 230)], shared]
    assert traces.distinct_pages(prompts, 16) == 4 + 2 + 1


def test_half_of_a_prompt_is_another_prompts() -> None:
    prompts, more = traces.Writer(0).halves(4, 2, 2048)
    assert [prompts, more] == traces.Writer(0).halves(4, 2, 2048)
    assert [prompts, more] != traces.Writer(1).halves(4, 2, 2048)
    pages = [traces.distinct_pages([ids], PAGE_SIZE) for ids in prompts]
    assert all(1900 < len(ids) <= 2048 for ids in prompts)
    both = traces.distinct_pages(prompts[:2], PAGE_SIZE)
    assert both == pytest.approx(0.75 * sum(pages[:2]), rel=0.02)
    assert traces.distinct_pages(prompts, PAGE_SIZE) == both + traces.distinct_pages(
        prompts[2:], PAGE_SIZE
    )
    # Another question about the same contexts.
    assert not set(prompts) & set(more)
    assert traces.distinct_pages([*prompts, *more], PAGE_SIZE) <= both * 2 + 8


def test_documents_are_asked_about_several_times() -> None:
    prompts = traces.Writer(0).documents(3, 2, 1024)
    assert len(set(prompts)) == 6
    pages = traces.distinct_pages(prompts, PAGE_SIZE)
    assert pages < 0.6 * sum(traces.distinct_pages([ids], PAGE_SIZE) for ids in prompts)


@pytest.mark.parametrize("cases", [DEFAULT, QUICK])
def test_the_reference_is_resident_and_comes_first(cases) -> None:
    for case in cases:
        names = [system.name for group in case.groups for system in group]
        assert case.reference.arena is None and len(set(names)) == len(names)


def test_both_servers_have_the_same_device_bytes() -> None:
    model = Model.embedded("bfloat16")
    quarter, same = (sizes(s, model, 64000, 16) for s in (QUARTER, SAME_BYTES))
    assert quarter.kv_bytes == kv_bytes(model, 64000) == 64000 * 5 * 2 * 2 * 128 * 2
    assert quarter.arena_bytes == quarter.kv_bytes // 4
    assert quarter.device_bytes == same.device_bytes > quarter.arena_bytes
    pool = same.tokens / PAGE_SIZE * (model.page_bytes + model.summary_bytes)
    assert 0 <= same.device_bytes - pool < model.page_bytes + model.summary_bytes
    assert quarter.tokens > 64000 and same.tokens < 0.34 * quarter.tokens


def test_flags_are_settings_of_the_server(tmp_path) -> None:
    from sglang_psa.compat import ServerArgs

    from sgl_psa.config import fields

    known = {f"psa_{f.name}" for f in fields()} | set(ServerArgs.__dataclass_fields__)
    model = Model.embedded("bfloat16")
    for system in [SAME_BYTES, *(system for group in VARIANTS for system in group)]:
        sized = sizes(system, model, 64000, 16)
        for device in ("cpu", "cuda"):
            given = flags(system, model, sized, 16, device, tmp_path)
            names = given[::2]
            assert {name.removeprefix("--").replace("-", "_") for name in names} <= known, names
            assert ("triton" in given) == (device == "cuda")


def test_shapes_are_those_of_a_models_folder(tmp_path) -> None:
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert Model.of(tmp_path, "float16") == (tmp_path, 3, 4, 16, "float16", 16384)
    shape |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = Model.of(tmp_path, "float16")
    assert model.page_bytes == 2 * 3 * 2 * 32 * PAGE_SIZE * 2 and model.context == 2048


def test_a_gpu_has_one_server_at_a_time_and_no_host_file(fakes, tmp_path, monkeypatch) -> None:
    up = []
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    inner = rounds.CaseRun._up

    def counted(self, group):
        up.append([system.name for system in group])
        return inner(self, group)

    monkeypatch.setattr(rounds.CaseRun, "_up", counted)
    arguments = ["--device", "cuda", "--out", str(tmp_path)]
    assert command.main([*arguments, "--systems", ";".join((RESIDENT.name, REFUSING.name))]) == 0
    assert up == [[RESIDENT.name]]
