"""Watermarks: every implementation against the reference, under sequences of writes."""

import pytest
import torch
from sgl_psa_kernels.watermark import advance

PAGES = 6


def writes(page: int, calls: int, seed: int) -> list[list[int]]:
    """Slots of each call: a run or two in different pages, each from any place in its page."""
    rng = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=rng))

    result = []
    for _ in range(calls):
        slots: list[int] = []
        order = torch.randperm(PAGES, generator=rng).tolist()
        for first in order[: 1 + number(3)]:
            start = first * page + (number(page) if number(2) else 0)
            length = 1 + number(2 * page if first + 1 not in order[:3] else page)
            run = range(start, min(start + length, PAGES * page))
            if not {s // page for s in run} & {s // page for s in slots}:
                slots += run
        result.append(slots)
    return result


def check(page: int, backend: str, calls: int = 60) -> None:
    got, want = (torch.zeros(PAGES, dtype=torch.int32) for _ in range(2))
    for slots in writes(page, calls, seed=page):
        new = torch.tensor(slots, dtype=torch.int64)
        advance(got, new, page_size=page, backend=backend)
        advance(want, new, page_size=page, backend="reference")
        assert torch.equal(got, want), slots
    assert (want > 0).all()


@pytest.mark.parametrize("page", [1, 4, 16])
def test_matches_the_reference(page: int) -> None:
    check(page, "torch")


def test_bad_arguments_are_refused() -> None:
    marks, slots = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown backend 'cpu'"):
        advance(marks, slots, page_size=4, backend="cpu")
    with pytest.raises(ValueError, match=r"slots must be torch\.int64"):
        advance(marks, slots.int(), page_size=4, backend="torch")
    with pytest.raises(ValueError, match="power of two"):
        advance(marks, slots, page_size=3, backend="torch")
