"""The residency plot draws what snapshots say."""

import pytest

from sgl_psa.memory import plot

SNAPSHOT = {
    "num_frames": 10,
    "frames_by_layer": [3, 7],
    "history": {"steps": [4, 8, 12], "frames": [[1, 2], [2, 5], [3, 7]]},
}


def test_layers_are_stacked_up_to_what_they_hold() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, axes = pyplot.subplots()
    plot.draw(axes, SNAPSHOT, "uneven")
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops == [3, 10]
    assert axes.get_lines()[0].get_ydata()[0] == 10


def test_a_picture_is_written_with_a_panel_for_each_cache(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "residency.svg"
    plot.residency({"uneven": SNAPSHOT, "even": SNAPSHOT}, path)
    assert path.read_text().count("decode step") >= 2


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no snapshots"):
        plot.residency({}, "none.png")
    empty = {**SNAPSHOT, "history": {"steps": [], "frames": []}}
    with pytest.raises(ValueError, match="'new' has no samples; run more"):
        plot.residency({"new": empty}, "none.png")
