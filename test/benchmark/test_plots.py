"""Pictures of benchmark results: what is drawn, from what the scripts write."""

import json

import pytest
from matplotlib.axes import Axes

from benchmark.gpu import plot as gpu_plot
from benchmark.ops import prefill, report
from benchmark.panels import bandwidth_line
from benchmark.serving import plot as serving_plot


@pytest.fixture
def drawn(monkeypatch):
    """(title, points) of every line, as it was when its panel was named."""
    found, lines = [], []
    plot, title = Axes.plot, Axes.set_title

    def plotted(self, x, y, *rest, **style):
        lines.append(list(zip(x, y, strict=True)))
        return plot(self, x, y, *rest, **style)

    def titled(self, text, *rest, **style):
        found.extend((text, line) for line in lines)
        lines.clear()
        return title(self, text, *rest, **style)

    monkeypatch.setattr(Axes, "plot", plotted)
    monkeypatch.setattr(Axes, "set_title", titled)
    return found


def test_steps_of_servers_by_context(drawn, tmp_path) -> None:
    same = {"model": "recall", "threads": 1, "batch": 4, "system": "sgl_psa"}
    rows = [same | {"context": c, "decode_ms_median": ms} for c, ms in ((8192, 4.0), (1024, 3.0))]
    rows.append(same | {"context": 1024, "decode_ms_median": 9.0, "threads": 2})
    path = serving_plot.plot(rows, tmp_path / "new" / "serving.png")
    assert path.stat().st_size > 0
    assert drawn == [
        ("recall, 4 at once", [(1024, 3.0), (8192, 4.0)]),
        ("recall, 4 at once, 2 threads", [(1024, 9.0)]),
    ]


def test_speed_of_prefill(drawn, tmp_path) -> None:
    rows = [{"dtype": "float32", "backend": "cpu", "context": 512, "gflops": 200.0}]
    assert prefill.plot(rows, tmp_path / "prefill.png").exists()
    assert drawn == [("float32", [(512, 200.0)])]


def test_a_roofline_has_the_bandwidth_of_its_threads(drawn, tmp_path) -> None:
    def row(op: str, size: int, ms: float) -> dict:
        return {"op": op, "threads": 1, "bytes": size, "ms_median": ms, "gbps": size / ms / 1e6}

    rows = [row("stream_read", 10**9, 50.0), row("psa", 10**6, 0.5), row("psa", 10**8, 6.0)]
    report.plot(rows, tmp_path / "ops.png")
    assert drawn[0] == ("1 thread", [(10**6, 0.5), (10**8, 6.0)])
    assert drawn[1][1] == [(10**6, pytest.approx(0.05)), (10**9, pytest.approx(50.0))]
    assert bandwidth_line(2e10, [10**6, 10**9])[1] == drawn[1][1]


def test_pictures_of_a_gpu(drawn, tmp_path, monkeypatch, capsys) -> None:
    variant = {"triton psa": {"bytes": 10**6, "ms": {"median": 0.01}}}
    ops = {
        "copy_bytes_per_second": 4e12,
        "results": [{"page_size": 16, "variants": variant}, {"page_size": 64, "variants": variant}],
    }
    row = {"batch": 16, "length": 8192, "step_ms": {"median": 7.0}}
    files = [tmp_path / "gpu_decode_op.json", tmp_path / "gpu_serving.json"]
    for file, told in zip(files, (ops, {"results": {"fa3": [row]}}), strict=True):
        file.write_text(json.dumps(told))
    gpu_plot.main([str(file) for file in files])
    assert all(file.with_suffix(".png").exists() for file in files)
    assert [title for title, _ in drawn[::2]] == [f"pages of {n} tokens" for n in (16, 64)] + [
        "16 at once"
    ]
    assert drawn[-1] == ("16 at once", [(8192, 7.0)])
    capsys.readouterr()
    monkeypatch.setattr(gpu_plot.importlib.util, "find_spec", lambda name: None)
    gpu_plot.main([str(files[0])])
    assert "no picture without matplotlib" in capsys.readouterr().out
