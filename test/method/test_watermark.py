"""Watermarks against a token-by-token model, under any sequence of writes and re-use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_psa.scorers import watermark as watermark_module
from sgl_psa.scorers.watermark import advance, touched_pages

PAGE = 4
PAGES = 5

runs = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGE - 1), st.integers(1, 2 * PAGE)),
    min_size=1,
    max_size=4,
)


def model(watermark: list[int], slots: list[int]) -> None:
    """One token at a time: a page's first slot starts it anew, a gap is not recorded."""
    for slot in slots:
        page, offset = divmod(slot, PAGE)
        if offset == 0 or watermark[page] >= offset:
            watermark[page] = offset + 1


@settings(max_examples=300, deadline=None)
@given(st.lists(runs, min_size=1, max_size=6))
@pytest.mark.parametrize("few", [0, watermark_module._FEW])
def test_any_sequence_of_writes_matches_the_token_by_token_model(few, calls) -> None:
    watermark = torch.zeros(PAGES, dtype=torch.int32)
    expected = [0] * PAGES
    for call in calls:
        slots, used = [], set()
        for page, offset, length in call:
            run = [s for s in range(page * PAGE + offset, page * PAGE + offset + length)]
            run = [s for s in run if s < PAGES * PAGE]
            if used & {s // PAGE for s in run}:
                continue  # a forward pass writes a page in one run
            used |= {s // PAGE for s in run}
            slots += run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watermark_module, "_FEW", few)
            advance(watermark, torch.tensor(slots, dtype=torch.int64), PAGE)
        model(expected, slots)
        assert watermark.tolist() == expected


def test_reuse_of_a_page_forgets_the_previous_owner() -> None:
    watermark = torch.zeros(2, dtype=torch.int32)
    advance(watermark, torch.arange(PAGE, 2 * PAGE), PAGE)
    assert watermark.tolist() == [0, PAGE]
    advance(watermark, torch.tensor([PAGE]), PAGE)
    assert watermark.tolist() == [0, 1]


def test_touched_pages_are_listed_once() -> None:
    assert touched_pages(torch.tensor([4, 5, 9, 4]), PAGE).tolist() == [1, 2]
