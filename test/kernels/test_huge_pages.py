"""Huge pages behind host tensors."""

from pathlib import Path

import torch
from sgl_psa_kernels._native.huge_pages import HUGE_PAGE, use_huge_pages


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("address is not mapped")


def test_the_mapping_is_marked_and_keeps_its_contents() -> None:
    tensor = torch.arange(5 * HUGE_PAGE // 4, dtype=torch.int32)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert "hg" not in flags_of(middle)
    accepted = use_huge_pages(tensor)
    assert ("hg" in flags_of(middle)) == accepted
    assert torch.equal(tensor, torch.arange(len(tensor), dtype=torch.int32))


def test_small_tensors_are_left_alone() -> None:
    assert not use_huge_pages(torch.zeros(1000))
    assert not use_huge_pages(torch.zeros(0))
