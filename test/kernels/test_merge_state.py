"""Merging partial attention results."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgl_psa_kernels.merge_state import merge_state

INF = float("inf")


def attention(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention; over no tokens: 0 and -inf."""
    lse = torch.logsumexp(logits, dim=-1) if logits.numel() else torch.tensor(-INF).double()
    weights = torch.exp(logits - lse) if logits.numel() else logits
    return weights @ values, lse


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    spread=st.sampled_from([0.1, 3.0, 200.0]),
    seed=st.integers(0, 2**31),
)
def test_any_order_of_merging_gives_the_softmax_over_all(sizes, order, spread, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logits = spread * torch.randn(total, generator=rng, dtype=torch.float64)
    values = torch.randn(total, 3, generator=rng, dtype=torch.float64)
    parts = list(zip(logits.split(sizes), values.split(sizes), strict=True))
    states = [attention(*part) for part in parts]
    while len(states) > 1:
        a = states.pop(order.randrange(len(states)))
        b = states.pop(order.randrange(len(states)))
        states.append(merge_state(*a, *b))
    out, lse = states[0]
    want_out, want_lse = attention(logits, values)
    torch.testing.assert_close(out, want_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_the_output_of_an_empty_part_is_ignored() -> None:
    out = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    lse = torch.tensor([0.5, -INF])
    nothing = torch.full_like(out, float("nan"))
    empty = torch.full_like(lse, -INF)
    for merged, merged_lse in (
        merge_state(out, lse, nothing, empty),
        merge_state(nothing, empty, out, lse),
    ):
        assert merged.tolist() == [[1.0, 2.0], [0.0, 0.0]]
        assert merged_lse.tolist() == [0.5, -INF]
