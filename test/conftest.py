"""How the tests share the cores: several workers, each server started by one of them alone."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers whose threads wait for each other spin on the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Fixture of several modules -> the group of tests that use it; the first one counts.
SHARED = {"server": "shared servers", "uncached": "shared servers", "served": "served model"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that talk to the same processes stay on one worker: ``--dist loadgroup``.

    Starting a server takes longer than most tests, and a fixture of the session lives in one
    worker. A module whose tests share a server of their own, but not all of them those of others,
    names its group itself.
    """
    for item in items:
        if item.get_closest_marker("server") is None or item.get_closest_marker("xdist_group"):
            continue
        fixtures = set(getattr(item, "fixturenames", ()))
        groups = [group for name, group in SHARED.items() if name in fixtures]
        item.add_marker(pytest.mark.xdist_group([*groups, item.path.stem][0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fails tests of a group that pytest-xdist's scheduler does not see: it goes by node ids."""
    grouped = getattr(item.config.option, "loadgroup", False)  # in workers only
    if grouped and item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
        pytest.fail(
            f"pytest {pytest.__version__} keeps pytest-xdist from naming groups, so every worker "
            "would start every server: install the versions of constraints.txt",
            pytrace=False,
        )
