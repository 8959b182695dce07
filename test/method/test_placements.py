"""Orders of victims against plain sorts, for every placement."""

import pytest
import torch
from sgl_psa_kernels.page_tier import TierShape, TierTables

from sgl_psa.config import DEFAULTS, ConfigError
from sgl_psa.memory.placements import PLACEMENTS
from sgl_psa.memory.placements.demand import HALF_LIFE

SHAPE = TierShape(4, 60, 100, 16, 2, 32, torch.float32)


def tables(seed: int, shape: TierShape = SHAPE) -> TierTables:
    """Every third frame free or busy, the others with pages of random use."""
    rng = torch.Generator().manual_seed(seed)
    made = TierTables.empty(shape)
    frames = torch.randperm(shape.num_frames, generator=rng)
    used = frames[: shape.num_frames * 4 // 5]
    pages = torch.randperm(shape.num_layers * shape.num_pages, generator=rng)[: len(used)]
    made.owner[used] = pages
    made.frame_of.view(-1)[pages] = used.int()
    made.stamp.view(-1)[pages] = torch.randint(0, 9, (len(used),), generator=rng).int()
    made.uses[used] = torch.randint(0, 70, (len(used),), generator=rng).int()
    made.came[used] = 1000 + torch.randperm(len(used), generator=rng)
    made.busy[used[: len(used) // 8]] = 1
    return made


def recency(made: TierTables, frame: int) -> tuple[int, int]:
    return int(made.stamp.view(-1)[made.owner[frame]]), int(made.came[frame])


def clean(made: TierTables) -> list[int]:
    return torch.nonzero((made.owner >= 0) & (made.busy == 0)).flatten().tolist()


@pytest.mark.parametrize("count", [1, 10, 100])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_victims_are_clean_frames_each_once(name: str, count: int) -> None:
    made = tables(1)
    order = PLACEMENTS[name](SHAPE).victims(made, count)
    assert order.dtype == torch.int32 and order.dim() == 2
    assert order.shape[0] == (SHAPE.num_layers if name == "even" else 1)
    named = order[order >= 0].tolist()
    assert len(set(named)) == len(named) and set(named) <= set(clean(made))
    if count == 100:
        assert set(named) == set(clean(made))
    for row in order.tolist():
        assert -1 not in row[: sum(f >= 0 for f in row)]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_an_empty_tier_has_no_victims(name: str) -> None:
    order = PLACEMENTS[name](SHAPE).victims(TierTables.empty(SHAPE), 5)
    assert (order == -1).all()


def test_the_default_is_a_placement() -> None:
    assert DEFAULTS["placement"] in PLACEMENTS


@pytest.mark.parametrize("count", [7, 60])
def test_lru_goes_by_step_and_then_by_coming(count: int) -> None:
    made = tables(2)
    want = sorted(clean(made), key=lambda f: recency(made, f))
    assert PLACEMENTS["lru"](SHAPE).victims(made, count)[0].tolist() == want[:count]


def test_layer_even_is_lru_of_each_layer_within_its_quota() -> None:
    made = tables(3)
    placement = PLACEMENTS["even"](SHAPE)
    assert placement.quota == 25
    order = placement.victims(made, 6)
    for layer, row in enumerate(order.tolist()):
        mine = [f for f in clean(made) if int(made.owner[f]) // SHAPE.num_pages == layer]
        want = sorted(mine, key=lambda f: recency(made, f))[:6]
        assert row == want + [-1] * (6 - len(want))


def test_layer_even_needs_the_minimum_in_every_layer() -> None:
    with pytest.raises(ConfigError, match=r"placement='even' leaves 7 .* or placement to demand"):
        PLACEMENTS["even"](SHAPE._replace(num_frames=31))


@pytest.mark.parametrize("count", [1, 9, 40])
def test_demand_goes_by_halvings_and_then_by_recency(count: int) -> None:
    made = tables(4)
    want = sorted(clean(made), key=lambda f: (int(made.uses[f]).bit_length(), recency(made, f)[0]))
    order = PLACEMENTS["demand"](SHAPE).victims(made, count)[0].tolist()
    rank = {f: (int(made.uses[f]).bit_length(), recency(made, f)[0]) for f in want}
    assert [rank[f] for f in order] == [rank[f] for f in want[:count]]


def test_keys_of_the_largest_numbers_keep_their_order() -> None:
    made = TierTables.empty(SHAPE)
    made.owner[:3] = torch.tensor([5, 70, 9])
    made.stamp.view(-1)[[5, 70, 9]] = torch.tensor([2**31 - 1, 1, 2**31 - 2], dtype=torch.int32)
    made.uses[:3] = torch.tensor([2**31 - 1, 2**31 - 1, 2**30 - 1])
    made.came[:3] = torch.tensor([1, 2**60, 3])
    assert PLACEMENTS["demand"](SHAPE).victims(made, 3).tolist() == [[2, 1, 0]]
    assert PLACEMENTS["lru"](SHAPE).victims(made, 3).tolist() == [[1, 2, 0]]


def test_demand_is_halved_by_the_step_and_by_nothing_else() -> None:
    made, placement = tables(5), PLACEMENTS["demand"](SHAPE)
    before = made.uses.clone()
    for step in range(1, HALF_LIFE):
        placement.age(made, step)
        placement.victims(made, 10)
    assert torch.equal(made.uses, before)
    placement.age(made, HALF_LIFE)
    assert torch.equal(made.uses, before // 2)


def test_demand_outlives_recency() -> None:
    """A page that many heads selected stays, one that a single head has just selected goes."""
    made = TierTables.empty(SHAPE)
    made.owner[:2] = torch.tensor([5, 70])
    made.stamp.view(-1)[5], made.stamp.view(-1)[70] = 3, 9
    made.uses[:2] = torch.tensor([64, 1])
    assert PLACEMENTS["demand"](SHAPE).victims(made, 1).tolist() == [[1]]
    assert PLACEMENTS["lru"](SHAPE).victims(made, 1).tolist() == [[0]]
