"""min_context=auto: the crossover of the kernels in use, and the number that overrides it."""

from typing import get_args

import pytest
import torch
from sgl_psa_kernels import BACKENDS

from sgl_psa import crossover
from sgl_psa.config import BackendName, ConfigError, PSAConfig
from test.method.cache import PAGE, decode, make_cache, make_wrapper

LENGTHS = [40 * PAGE, 39 * PAGE, 12 * PAGE]


def test_every_backend_has_a_crossover() -> None:
    assert set(crossover.CROSSOVER) == set(get_args(BackendName)) - {"auto"} >= set(BACKENDS)


@pytest.mark.parametrize(("given", "sparse_rows"), [(None, 1), ("auto", 1), (12 * PAGE, 3), (0, 3)])
def test_short_requests_are_dense_unless_asked_otherwise(
    backend, monkeypatch, given, sparse_rows
) -> None:
    monkeypatch.setitem(crossover.CROSSOVER, backend, 40 * PAGE)
    config = PSAConfig(delta=0.5) if given is None else PSAConfig(delta=0.5, min_context=given)
    cache = make_cache(LENGTHS, 2, 32, seed=3)
    q = torch.randn(len(LENGTHS), 4, 32, generator=torch.Generator().manual_seed(4))
    wrapper, _ = make_wrapper(cache, config, backend)
    _, step = decode(wrapper, cache, q, 32**-0.5)
    assert step.sparse_rows == sparse_rows


def test_settings_take_the_word_or_a_number_as_text() -> None:
    assert PSAConfig().min_context == "auto"
    assert PSAConfig.from_sources({"min_context": "512"}, environ={}).min_context == 512
    sources = PSAConfig.from_sources(None, {"min_context": "auto"}, {"SGL_PSA_MIN_CONTEXT": "9"})
    assert sources.min_context == "auto"
    with pytest.raises(ConfigError, match="expected an integer >= 0, or auto"):
        PSAConfig(min_context="automatic")
