"""Ids outside the vocabulary are refused by name, whatever the shape of the request."""

from types import SimpleNamespace

import pytest
from sglang_psa.token_ids import check_token_ids

from sgl_psa.config import ConfigError

MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


@pytest.mark.parametrize("ids", [None, [], [0, 99], [[0], [99]], [[]]])
def test_ids_in_range_pass(ids: object) -> None:
    check_token_ids(MANAGER, SimpleNamespace(input_ids=ids))
    check_token_ids(MANAGER, SimpleNamespace())


@pytest.mark.parametrize(
    ("ids", "bad"), [([5, 100], 100), ([-1, 5], -1), ([[5], [7, 400]], 400), ([[], [-7]], -7)]
)
def test_ids_out_of_range_are_named(ids: object, bad: int) -> None:
    with pytest.raises(ConfigError, match=f"{bad} is no token of this model, ids are 0 to 99"):
        check_token_ids(MANAGER, SimpleNamespace(input_ids=ids))
