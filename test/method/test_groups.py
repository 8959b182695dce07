"""group_percent=auto: the growth of the kernels in use, and the number that overrides it."""

from typing import get_args

import pytest
import torch

from sgl_psa import groups
from sgl_psa.config import BackendName, PSAConfig
from test.method.cache import PAGE, decode, make_cache, make_wrapper

LENGTH = 60 * PAGE


def test_every_backend_says_how_groups_grow() -> None:
    assert set(groups.GROWTH) == set(get_args(BackendName)) - {"auto"}


def rounds_and_pages(backend: str, **settings) -> tuple[float, float]:
    config = PSAConfig(delta=1e-9, min_context=0, group_pages=1, scorer="exact", **settings)
    cache = make_cache([LENGTH], 2, 32, seed=3)
    q = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(4))
    wrapper, _ = make_wrapper(cache, config, backend)
    _, step = decode(wrapper, cache, q, 32**-0.5)
    counts = step.layer(0)
    return counts.rounds / counts.visits, counts.pages_attended / counts.visits


@pytest.mark.parametrize(
    ("auto", "given", "rounds"),
    [
        (0, {}, 57),
        (100, {}, 5),  # 3 forced pages, then 3, 6, 12, 24, 12
        (100, {"group_percent": 0}, 57),
        (0, {"group_percent": 200}, 3),  # 6, 18, 33
        (0, {"group_percent": "auto"}, 57),
    ],
)
def test_groups_grow_as_the_setting_says(backend, monkeypatch, auto, given, rounds) -> None:
    monkeypatch.setitem(groups.GROWTH, backend, auto)
    assert rounds_and_pages(backend, **given) == (rounds, 60)
