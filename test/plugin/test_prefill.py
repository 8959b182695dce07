"""Both ways of prefill against each other: they must be the same attention."""

import pytest
import torch
from sglang_psa import prefill


@pytest.mark.parametrize("prefix", [0, 1, 24])
@pytest.mark.parametrize("group", [1, 4])
def test_fused_equals_two_parts(prefix, group):
    torch.manual_seed(0)
    new, heads, dim = 9, 2, 16
    q = torch.randn(new, heads * group, dim)
    k, v = torch.randn(2, new, heads, dim)
    past = torch.randn(2, prefix, heads, dim) if prefix else (None, None)
    reference = prefill.two_parts(q, *past, k, v, 0.25, backend="reference")
    for other in (
        prefill.fused(q, *past, k, v, 0.25),
        prefill.two_parts(q, *past, k, v, 0.25, backend="cpu"),
    ):
        torch.testing.assert_close(other, reference, rtol=1e-4, atol=1e-5)


def test_choice_follows_device_and_kernels():
    assert prefill.choose("cpu", "cuda") is prefill.fused
    for kernels, backend in (("cpu", "cpu"), ("reference", "reference"), ("torch", "torch")):
        assert prefill.choose(kernels, "cpu").keywords == {"backend": backend}
    assert prefill.choose("triton", "cpu").keywords == {"backend": "torch"}  # interpreted
