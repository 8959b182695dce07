"""The op benchmark: what its rows say, and that its yardsticks are what they claim to be."""

import json

import pytest
import torch

from benchmark.ops import __main__ as command
from benchmark.ops import decode, keys, peers, report, scoring
from benchmark.ops.measure import measure
from benchmark.ops.setting import Heads, Setting
from benchmark.ops.stream import stream_read

ROW = {
    "op",
    "backend",
    "isa",
    "context",
    "batch",
    "threads",
    "ms_median",
    "gbps",
    "bandwidth_fraction",
    "pages_fraction",
    "vs_torch_native",
}
HEADS = Heads(query=4, kv=2, dim=64, page=16)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(1024, 2, HEADS, pool_bytes=1, min_layers=2)


@pytest.fixture(scope="module")
def rows(setting: Setting) -> list[dict]:
    ops = [op for group in command.GROUPS.values() for op in group(setting)]
    return measure(setting, ops, threads=1, rounds=1, flush=torch.ones(1 << 16))


def test_every_row_has_the_columns(rows) -> None:
    names = [row["op"] for row in rows]
    assert len(names) == len(set(names))
    assert {"stream_read", "torch_native", "sdpa_contiguous", "dense_decode", "psa"} <= set(names)
    for row in rows:
        assert set(row) >= ROW
        assert row["ms_median"] > 0 and row["bandwidth_fraction"] > 0
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms_median"] / 1e6)


def test_whole_steps_are_compared_with_torch(rows) -> None:
    by_name = {row["op"]: row for row in rows}
    peer = by_name["torch_native"]["ms_median"]
    for row in rows:
        whole = row["op"].startswith(("psa", "torch", "sdpa", "dense"))
        assert (row["vs_torch_native"] is not None) == whole
        if whole:
            assert row["vs_torch_native"] == pytest.approx(peer / row["ms_median"])


def test_bytes_are_those_that_must_be_read(rows, setting) -> None:
    by_name = {row["op"]: row for row in rows}
    dense = 2 * 1024 * HEADS.kv * HEADS.dim * 2 * 2
    for name in ("torch_native", "sdpa_contiguous", "dense_decode"):
        assert by_name[name]["bytes"] == dense and by_name[name]["pages_fraction"] == 1
    sparse, alone = by_name["psa"], by_name["progressive_decode"]
    assert 0 < sparse["pages_fraction"] < 1
    assert alone["bytes"] == pytest.approx(sparse["pages_fraction"] * dense)
    scored = by_name["sketch_score_two_level"]["bytes"]
    assert sparse["bytes"] == pytest.approx(alone["bytes"] + scored)


def test_peers_and_ours_attend_alike(setting) -> None:
    out = {op.name: op.call(1) for op in [*peers.ops(setting), *decode.ops(setting)]}
    torch.testing.assert_close(
        out["sdpa_contiguous"][:, :, 0], out["dense_decode"][0], atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("elements", [0, 5, 64, 1000, 100_003])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_yardstick_reads_every_line(elements: int, threads: int) -> None:
    rng = torch.Generator().manual_seed(elements)
    x = torch.randint(1 << 62, (elements + 8,), generator=rng)
    # Whole cache lines inside of the tensor, found by address.
    skip = -x.data_ptr() % 64 // 8
    lines = x[skip : skip + (len(x) - skip) // 8 * 8].tolist()
    expected = 0
    for word in lines:
        expected ^= word
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert stream_read(x) == expected
    finally:
        torch.set_num_threads(before)


def test_queries_have_the_mass_where_it_is_said_to_be() -> None:
    k, q = keys.mixed(2048, kv_heads=1, group=2, dim=64)
    for query in q.float():
        logits = k[:, 0].float() @ query * 64**-0.5
        assert keys.hot_share(logits) == pytest.approx(keys.HOT_SHARE, abs=0.02)


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys) -> None:
    small = Setting(1024, 1, HEADS, pool_bytes=1, in_order=True)
    asked = []
    monkeypatch.setattr(command, "Setting", lambda *size, **how: asked.append((size, how)) or small)
    monkeypatch.setattr(command, "FLUSH_BYTES", 1 << 16)
    groups = ["--only", "peers", "--only", "scoring"]
    command.main(["--quick", "--in-order", *groups, "--out", str(tmp_path)])
    assert asked == [((4096, 1), {"in_order": True})]
    rows = json.loads((tmp_path / "bench_ops.json").read_text())
    assert isinstance(rows, list) and all(set(row) >= ROW and row["in_order"] for row in rows)
    assert len(rows) == len(peers.ops(small)) + len(scoring.ops(small))
    assert (tmp_path / "bench_ops.png").stat().st_size > 0
    assert (tmp_path / "bench_ops.md").read_text() == report.markdown(rows)
    assert report.markdown(rows) in capsys.readouterr().out
