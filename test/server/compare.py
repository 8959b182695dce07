"""What "the same as without a cache" means: the same tokens, from the same selection of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def tokens(answers: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Output ids of answers."""
    return [answer["output_ids"] for answer in answers]


def reads(answer: dict[str, Any]) -> dict[str, Any]:
    """``meta_info["psa"]`` of an answer."""
    found: dict[str, Any] = answer["meta_info"]["psa"]
    return found


def assert_same(got: Sequence[dict[str, Any]], want: Sequence[dict[str, Any]]) -> None:
    """Equal greedy tokens, from sparse decode that selected alike with summaries for every page.

    A missing summary would show as stale pages. A summary of other keys would change which pages
    are read, and with it the count of pages; 5 % are left for selections that hang on rounding.
    """
    assert tokens(got) == tokens(want)
    for one, other in zip(got, want, strict=True):
        mine, theirs = reads(one), reads(other)
        assert mine["stale_pages"] == theirs["stale_pages"] == 0
        assert mine["pages_fraction"] < 0.7, "nothing was sparse: the comparison proves nothing"
        assert mine["decode_steps"] == theirs["decode_steps"]
        assert mine["pages_total"] == theirs["pages_total"]
        assert mine["pages_attended"] == pytest.approx(theirs["pages_attended"], rel=0.05)
