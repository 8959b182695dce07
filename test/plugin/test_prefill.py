"""Both ways of prefill against each other: they must be the same attention."""

import pytest
import torch
from sglang_psa import prefill

from sgl_psa.config import PSAConfig


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


def test_choice_follows_device_and_setting():
    assert prefill.choose(PSAConfig(), "cuda") is prefill.fused
    assert prefill.choose(PSAConfig(), "cpu").keywords == {"backend": "cpu"}
    asked = prefill.choose(PSAConfig(backend="reference"), "cpu")
    assert asked.keywords == {"backend": "reference"}
