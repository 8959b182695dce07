"""The prefill benchmark: its peers compute the same, and its rows say so much."""

import pytest
import torch

from benchmark.ops import prefill


def test_peers_are_the_same_attention() -> None:
    outs = {name: run()[0] for name, run in prefill.ways(5, 20, torch.float32).items()}
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["torch_native"], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("prefix", [0, 30])
def test_rows_count_what_queries_see(prefix: int) -> None:
    rows = prefill.measure(4, prefix, "bfloat16", 1)
    assert [row["backend"] for row in rows] == ["cpu", "torch", "torch_native"]
    seen = 4 * prefix + 4 * 4 / 2
    for row in rows:
        flops = 4 * prefill.QUERY_HEADS * prefill.DIM * seen
        assert row["gflops"] == pytest.approx(flops / row["ms_median"] / 1e6)
        assert row["vs_torch_native"] == pytest.approx(rows[-1]["ms_median"] / row["ms_median"])
