"""New rows of K and V: C++ and the specification against indexing, bad input."""

import pytest
import torch
from sgl_psa_kernels.kv_write import PreparedWrite, kv_write

BACKENDS = ["reference", "cpu"]
SLOTS, HEADS = 50, 3


def caches(dtype: torch.dtype, apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """K of 16 elements a head, V of 24, all -1."""
    if apart:
        made = (torch.full((HEADS, SLOTS, dim), -1.0).to(dtype) for dim in (16, 24))
        k, v = (x.permute(1, 0, 2) for x in made)
    else:
        k, v = (torch.full((SLOTS, HEADS, dim), -1.0).to(dtype) for dim in (16, 24))
    return k, v


def rows(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices of a projection, as they come from a model."""
    packed = torch.randn(count, HEADS * 40 + 5).to(dtype)
    k, v = packed[:, : HEADS * 16], packed[:, HEADS * 16 : HEADS * 40]
    return k.unflatten(1, (HEADS, 16)), v.unflatten(1, (HEADS, 24))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_to_their_slots(backend: str, apart: bool, dtype: torch.dtype) -> None:
    for slots in ([], [7], [49, 0, 3], list(range(10, 45))):
        k, v = rows(len(slots), dtype)
        k_cache, v_cache = caches(dtype, apart)
        want_k, want_v = k_cache.clone(), v_cache.clone()
        want_k[slots], want_v[slots] = k, v
        kv_write(k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64), backend=backend)
        assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_row_of_a_slot_stays(backend: str) -> None:
    count = 4000  # Enough for several threads.
    k, v = rows(count, torch.float32)
    slots = torch.arange(count) % 7
    k_cache, v_cache = caches(torch.float32, apart=True)
    torch.set_num_threads(2)
    try:
        kv_write(k, v, k_cache, v_cache, slots, backend=backend)
    finally:
        torch.set_num_threads(1)
    last = [max(i for i in range(count - 7, count) if i % 7 == slot) for slot in range(7)]
    assert torch.equal(k_cache[:7], k[last]) and torch.equal(v_cache[:7], v[last])
    assert (k_cache[7:] == -1).all() and (v_cache[7:] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_a_slot_outside_of_the_pool_writes_nothing(backend: str, slot: int) -> None:
    k, v = rows(2, torch.float32)
    k_cache, v_cache = caches(torch.float32, apart=False)
    with pytest.raises(ValueError, match=r"slots\[1\] lies outside"):
        kv_write(k, v, k_cache, v_cache, torch.tensor([3, slot]), backend=backend)
    assert (k_cache == -1).all() and (v_cache == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_refused(backend: str) -> None:
    k, v = rows(2, torch.float32)
    k_cache, v_cache = caches(torch.float32, apart=False)
    slots = torch.tensor([0, 1])
    for bad, match in (
        ((k.half(), v, k_cache, v_cache, slots), "k must be"),
        ((k, v[:1], k_cache, v_cache, slots), "v must have shape"),
        ((k, v, k_cache, v_cache[:9], slots), "differ in slots"),
        ((k, v, k_cache, v_cache, slots.int()), "slots must be torch.int64"),
        ((k, v, k_cache.transpose(1, 2), v_cache, slots), "k_cache must be"),
        ((torch.cat([k, k], 2)[..., ::2], v, k_cache, v_cache, slots), "contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            kv_write(*bad, backend=backend)
    with pytest.raises(ValueError, match="unknown backend"):
        kv_write(k, v, k_cache, v_cache, slots, backend="torch")


def test_a_prepared_call_knows_what_it_serves() -> None:
    k, v = rows(3, torch.bfloat16)
    write = PreparedWrite(*caches(torch.bfloat16, apart=True))
    slots = torch.tensor([5, 1, 2])
    assert write.serves(k, v, slots)
    assert write.serves(k[:2], v[:2], slots[:2])
    assert not write.serves(k.float(), v, slots)
    assert not write.serves(k, v.float(), slots)
    assert not write.serves(k[:2], v, slots)
    assert not write.serves(k[:, :2], v, slots)
    assert not write.serves(k, v, slots.int())
    assert not write.serves(k, v, torch.arange(6)[::2])
    assert not write.serves(torch.cat([k, k], 2)[..., ::2], v, slots)
