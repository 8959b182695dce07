"""What benchmark.group_growth counts: growing groups take fewer rounds, and read no less."""

from argparse import Namespace

from benchmark.group_growth import RULES, measure


def test_growing_groups_take_fewer_rounds() -> None:
    options = Namespace(
        percents="0,100",
        sizes="16",
        model_tokens=1024,
        made_up_tokens=4096,
        steps=2,
        contexts=1,
        seed=7,
    )
    rows = list(measure(options))
    assert len(rows) == 2 * 3 * len(RULES)
    for source in ("embedded model", "made-up keys"):
        for stop in RULES:
            plain, growing, larger = (r for r in rows if (r["source"], r["stop"]) == (source, stop))
            assert (plain["group_percent"], growing["group_percent"]) == (0, 100)
            assert (plain["group_pages"], larger["group_pages"]) == (4, 16)
            assert larger["rounds"] < plain["rounds"] and larger["pages"] >= plain["pages"]
            assert (plain["violation_rate"] is None) == (stop == "marginal")
            assert 0 < growing["rounds"] < plain["rounds"]
            assert growing["pages"] >= plain["pages"] > 3
            assert 0 < plain["true_coverage"] <= growing["true_coverage"] + 0.01 <= 1.02
            assert 0 < plain["bytes_fraction"] <= growing["bytes_fraction"]
