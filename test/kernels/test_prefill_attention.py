"""Two-part prefill against a float64 softmax."""

import pytest
import torch
from kernel_cases import assert_rounded
from sgl_psa_kernels import prefill_attention
from sgl_psa_kernels.prefill_attention import cpu, prefill, prefill_blocks, short_products
from sgl_psa_kernels.wide_products import MIN_ROWS, faster_in_float32


def tensors(new: int, prefix: int, heads: int, group: int, dim: int, dtype: torch.dtype):
    rng = torch.Generator().manual_seed(new * 7919 + prefix)
    q = torch.randn(new, heads * group, dim, generator=rng).to(dtype)
    k = torch.randn(prefix + new, heads, dim, generator=rng).to(dtype)
    v = torch.randn(prefix + new, heads, dim, generator=rng).to(dtype)
    return q, k, v


def run(q, k, v, prefix: int, backend: str):
    return prefill(
        q, k[:prefix], v[:prefix], k[prefix:], v[prefix:], sm_scale=0.11, backend=backend
    )


def exact(q, k, v, prefix: int):
    """Softmax over the keys that each query sees, in float64, query by query."""
    group = q.shape[1] // k.shape[1]
    out, lse = [], []
    for i in range(q.shape[0]):
        seen = prefix + i + 1
        keys = k[:seen].double().repeat_interleave(group, 1)
        values = v[:seen].double().repeat_interleave(group, 1)
        logits = 0.11 * torch.einsum("hd,thd->ht", q[i].double(), keys)
        lse.append(torch.logsumexp(logits, 1))
        out.append(torch.einsum("ht,thd->hd", torch.softmax(logits, 1), values))
    return torch.stack(out), torch.stack(lse)


SHAPES = [
    (new, prefix, heads, group, dim)
    for new, heads, group, dim in ((1, 2, 4, 64), (5, 3, 1, 80), (33, 2, 2, 128), (40, 1, 7, 32))
    for prefix in (0, 1, 15, 130)
]
SHAPES.append((3, 4093, 2, 4, 64))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_softmax(shape, dtype: torch.dtype, backend: str) -> None:
    new, prefix, *rest = shape
    q, k, v = tensors(new, prefix, *rest, dtype)
    out, lse = run(q, k, v, prefix, backend)
    want_out, want_lse = exact(q, k, v, prefix)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # torch's kernel for 16-bit types uses a coarser exp.
    fine = backend == "reference" or dtype == torch.float32
    tolerance = 1e-5 if fine else 3e-4
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=tolerance)
    # Flash attention rounds weights and both parts to the dtype: three roundings of values <= 1.
    noise = 5e-6 if fine else 3 * torch.finfo(dtype).eps * float(want_out.abs().max())
    assert_rounded(out, want_out, noise, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("prefix", [1, 16, 45])
def test_two_parts_equal_one(prefix: int, backend: str) -> None:
    q, k, v = tensors(60, 0, 2, 4, 64, torch.float32)
    out, lse = run(q, k, v, 0, backend)
    part_out, part_lse = run(q[prefix:], k, v, prefix, backend)
    torch.testing.assert_close(part_out, out[prefix:], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(part_lse, lse[prefix:], rtol=1e-6, atol=2e-6)


def test_none_and_empty_prefix_are_the_same() -> None:
    q, k, v = tensors(9, 0, 2, 2, 64, torch.float32)
    for backend in ("reference", "cpu"):
        without = prefill(q, None, None, k, v, sm_scale=0.11, backend=backend)
        for a, b in zip(without, run(q, k, v, 0, backend), strict=True):
            assert torch.equal(a, b)


def test_strided_inputs() -> None:
    """Queries and keys as slices of a fused projection."""
    fused = torch.randn(20, 12, 64)
    q, k, v = fused[:, :8], fused[:, 8:10], fused[:, 10:]
    want = prefill(q, None, None, k, v, sm_scale=0.11, backend="reference")
    got = prefill(q, None, None, k, v, sm_scale=0.11, backend="cpu")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_mismatched_parts_are_refused() -> None:
    q, k, v = tensors(4, 8, 2, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="both k_prefix and v_prefix"):
        prefill(q, k[:8], None, k[8:], v[8:], sm_scale=1.0, backend="cpu")
    with pytest.raises(ValueError, match="one dtype"):
        prefill(q.bfloat16(), k[:8], v[:8], k[8:], v[8:], sm_scale=1.0, backend="cpu")
    with pytest.raises(ValueError, match="belong together"):
        prefill(q, None, None, k, v, sm_scale=1.0, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [0, 45])
def test_16_bit_input_computed_in_float32_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, prefix: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "faster_in_float32", lambda dtype: dtype != torch.float32)
    monkeypatch.setattr(cpu, "faster_in_short_products", lambda dtype: False)
    monkeypatch.setattr(prefill_attention, "BLOCK_TOKENS", 20)
    q, k, v = tensors(MIN_ROWS, prefix, 2, 2, 64, dtype)
    out, lse = run(q, k, v, prefix, "cpu")
    want_out, want_lse = exact(q, k, v, prefix)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert_rounded(out, want_out, 5e-6, dtype)


def test_only_16_bit_types_are_candidates_for_float32() -> None:
    assert not faster_in_float32(torch.float32)
    assert not faster_in_float32(torch.float64)


@pytest.mark.parametrize("shape", [(2, 2, 64), (1, 7, 80), (3, 1, 128), (2, 4, 256)], ids=str)
@pytest.mark.parametrize("prefix", [0, 45, 300])
@pytest.mark.parametrize("blocks", [(1024, 512), (48, 33)], ids=str)
def test_short_products_lose_nothing_but_weights(
    monkeypatch: pytest.MonkeyPatch, prefix: int, shape: tuple, blocks: tuple
) -> None:
    monkeypatch.setattr(cpu, "faster_in_short_products", lambda dtype: True)
    monkeypatch.setattr(prefill_attention, "BLOCK_TOKENS", 200)
    monkeypatch.setattr(short_products, "ROWS", blocks[0])
    monkeypatch.setattr(short_products, "KEYS", blocks[1])
    before = torch.backends.mkldnn.matmul.fp32_precision
    q, k, v = tensors(MIN_ROWS + 5, prefix, *shape, torch.bfloat16)
    out, lse = run(q, k, v, prefix, "cpu")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    want_out, want_lse = exact(q, k, v, prefix)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    # Each weight is off by half a unit of bf16 at most, their sum is not.
    noise = torch.finfo(torch.bfloat16).eps / 2 * float(v.double().abs().max())
    assert_rounded(out, want_out, noise, torch.bfloat16)


def test_short_products_are_for_bf16_only() -> None:
    for dtype in (torch.float16, torch.float32):
        assert not cpu.faster_in_short_products(dtype)
    torch_alone = cpu._all_seen
    assert cpu.faster_in_short_products(torch.bfloat16) == short_products.faster_than(torch_alone)


@pytest.mark.parametrize("way", ["16 bit", "float32", "short products"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("prefix", [1, 32, 75])
def test_blocks_through_one_buffer_are_the_whole_prefix_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, prefix: int, backend: str, way: str
) -> None:
    monkeypatch.setattr(prefill_attention, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(cpu, "faster_in_float32", lambda dtype: way == "float32")
    monkeypatch.setattr(cpu, "faster_in_short_products", lambda dtype: way == "short products")
    q, k, v = tensors(MIN_ROWS, prefix, 2, 2, 64, torch.bfloat16)
    buffers = torch.empty_like(k[:32]), torch.empty_like(v[:32])

    def blocks():
        for start in range(0, prefix, 32):
            stop = min(start + 32, prefix)
            for buffer, whole in zip(buffers, (k, v), strict=True):
                buffer.fill_(torch.nan)
                buffer[: stop - start] = whole[start:stop]
            yield tuple(buffer[: stop - start] for buffer in buffers)

    chunk = (k[prefix:], v[prefix:])
    got = prefill_blocks(q, blocks(), *chunk, sm_scale=0.11, backend=backend)
    for a, b in zip(got, run(q, k, v, prefix, backend), strict=True):
        assert torch.equal(a, b)


def test_blocks_of_other_sizes_are_refused() -> None:
    q, k, v = tensors(4, 8, 2, 2, 64, torch.float32)
    chunk = (k[8:], v[8:])
    with pytest.raises(ValueError, match="blocks must have 8192 tokens"):
        short = [(k[:4], v[:4]), (k[4:8], v[4:8])]
        prefill_blocks(q, short, *chunk, sm_scale=1.0, backend="cpu")
    with pytest.raises(ValueError, match="do not belong together"):
        prefill_blocks(q, [(k[:8, :1], v[:8, :1])], *chunk, sm_scale=1.0, backend="cpu")
