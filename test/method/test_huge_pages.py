"""Tensors in huge pages: zeros as before, and huge where the system allows it."""

import re
from pathlib import Path

import pytest
import torch

from sgl_psa import huge_pages
from sgl_psa.config import PSAConfig
from sgl_psa.scorers import CacheShape, make_scorer

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = 8 << 20


def mapping(tensor: torch.Tensor) -> dict[str, int]:
    """What the kernel says of the mapping that holds the tensor's middle; sizes in kB."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and (value := re.match(r"(\w+):\s+(\d+)", line)):
            found[value[1]] = int(value[2])
    return found


def huge_pages_are_given() -> bool:
    return SETTING.exists() and "[never]" not in SETTING.read_text()


@pytest.mark.skipif(not huge_pages_are_given(), reason="this system has no transparent huge pages")
def test_large_tensors_may_have_huge_pages() -> None:
    tensor = torch.ones(4 * LARGE, dtype=torch.uint8)
    assert huge_pages.zero_in_huge_pages(tensor)
    assert mapping(tensor)["Rss"] == 0, "memory that nobody uses yet is taken"
    assert not tensor.any()
    assert mapping(tensor)["THPeligible"] == 1


@pytest.mark.skipif(not huge_pages_are_given(), reason="this system has no transparent huge pages")
def test_state_of_scorers_is_advised() -> None:
    shape = CacheShape(2, 4096, 16, 2, 128, torch.device("cpu"))
    scorer = make_scorer(PSAConfig(sketch_bits=4), shape, "reference")
    large = [t for t in scorer.state_tensors() if t.numel() * t.element_size() >= LARGE]
    assert large and all(mapping(tensor)["THPeligible"] == 1 for tensor in large)


def test_neighbours_keep_their_bytes() -> None:
    whole = torch.ones(LARGE, dtype=torch.uint8)
    inner = whole[5:-7]
    huge_pages.zero_in_huge_pages(inner)
    assert int(whole.sum()) == 12 and not inner.any()


@pytest.mark.parametrize("tensor", [torch.ones(100), torch.ones(3000, 3000).t(), torch.ones(0)])
def test_others_are_only_filled(tensor: torch.Tensor) -> None:
    assert not huge_pages.zero_in_huge_pages(tensor)
    assert not tensor.any()


def test_a_system_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    tensor = torch.ones(LARGE, dtype=torch.uint8)
    assert not huge_pages.zero_in_huge_pages(tensor)
    assert not tensor.any()
