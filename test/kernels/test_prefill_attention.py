"""Two-part prefill against a float64 softmax."""

import pytest
import torch
from kernel_cases import assert_rounded
from sgl_psa_kernels import prefill_attention
from sgl_psa_kernels.prefill_attention import cpu, prefill, prefill_blocks, torch_flash
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


@pytest.fixture(params=["reference", "torch", "cpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend; "cpu" is the C++ kernel."""
    monkeypatch.setattr(cpu, "faster_in_torch", lambda dtype: False)
    return request.param


@pytest.fixture
def kernel(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backend "cpu" is the C++ kernel, once per instruction set."""
    monkeypatch.setattr(cpu, "faster_in_torch", lambda dtype: False)
    return isa


def weight_noise(isa: str, dtype: torch.dtype, v: torch.Tensor) -> float:
    """What the kernel may be off by before its result is rounded: each weight by half a unit of
    bf16 where the CPU multiplies bf16 numbers, their sum not."""
    rounded = isa == "avx512bf16" and dtype == torch.bfloat16
    return 5e-6 + rounded * torch.finfo(dtype).eps / 2 * float(v.double().abs().max())


SHAPES = [
    (new, prefix, heads, group, dim)
    for new, heads, group, dim in ((1, 2, 4, 64), (5, 3, 1, 80), (33, 2, 2, 128), (40, 1, 7, 32))
    for prefix in (0, 1, 15, 130)
]
SHAPES.append((3, 4093, 2, 4, 64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
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


#: More rows than a tile has, more keys than are packed together, and head_dims of every padding.
TILES = [(290, 45, 2, 2, 64), (130, 600, 1, 5, 16), (97, 256, 1, 1, 256), (64, 300, 1, 6, 208)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, *TILES], ids=str)
def test_kernel_matches_float64_softmax(shape, dtype: torch.dtype, kernel: str) -> None:
    new, prefix, *rest = shape
    q, k, v = tensors(new, prefix, *rest, dtype)
    out, lse = run(q, k, v, prefix, "cpu")
    want_out, want_lse = exact(q, k, v, prefix)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert_rounded(out, want_out, weight_noise(kernel, dtype, v), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_threads_or_other_rows(dtype: torch.dtype, kernel: str) -> None:
    q, k, v = tensors(400, 45, 2, 2, 64, dtype)
    out, lse = run(q, k, v, 45, "cpu")  # in tiles of 384 rows
    torch.set_num_threads(4)  # of 96
    try:
        for a, b in zip(run(q, k, v, 45, "cpu"), (out, lse), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)
    q[100], k[45 + 200] = torch.nan, torch.nan
    out[100], lse[100] = torch.nan, torch.nan
    bad_out, bad_lse = run(q, k, v, 45, "cpu")
    assert torch.equal(bad_out[:200].nan_to_num(), out[:200].nan_to_num())
    assert torch.equal(bad_lse[:200].nan_to_num(), lse[:200].nan_to_num())
    assert bad_out[100].isnan().all() and bad_out[200:].isnan().all()


@pytest.mark.parametrize("top", [-3e4, 3e4])
def test_logits_of_any_size(top: float, kernel: str) -> None:
    """One key has nearly all of the mass, or nearly none, far from zero."""
    q, k, v = tensors(20, 300, 1, 2, 64, torch.float32)
    q, k = q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True)
    k[150] = q[:, 0].mean(0) * top
    out, lse = run(q, k, v, 300, "cpu")
    want_out, want_lse = exact(q, k, v, 300)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", [1, 16, 45])
def test_two_parts_equal_one(prefix: int, way: str) -> None:
    q, k, v = tensors(60, 0, 2, 4, 64, torch.float32)
    out, lse = run(q, k, v, 0, way)
    part_out, part_lse = run(q[prefix:], k, v, prefix, way)
    torch.testing.assert_close(part_out, out[prefix:], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(part_lse, lse[prefix:], rtol=1e-6, atol=2e-6)


def test_none_and_empty_prefix_are_the_same(way: str) -> None:
    q, k, v = tensors(9, 0, 2, 2, 64, torch.float32)
    without = prefill(q, None, None, k, v, sm_scale=0.11, backend=way)
    for a, b in zip(without, run(q, k, v, 0, way), strict=True):
        assert torch.equal(a, b)


def test_no_rows(way: str) -> None:
    q, k, v = tensors(0, 9, 2, 2, 64, torch.bfloat16)
    out, lse = run(q, k, v, 9, way)
    assert out.shape == (0, 4, 64) and out.dtype == torch.bfloat16 and lse.shape == (0, 4)


def test_strided_inputs(way: str) -> None:
    """Slices of a fused projection, and keys and values whose heads are not contiguous."""
    fused = torch.randn(20, 12, 64)
    turned = torch.randn(20, 64, 12).transpose(1, 2)
    for whole in (fused, turned):
        q, k, v = fused[:, :8], whole[:, 8:10], whole[:, 10:]
        want = prefill(q, None, None, k, v, sm_scale=0.11, backend="reference")
        got = prefill(q, None, None, k, v, sm_scale=0.11, backend=way)
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
def test_torch_in_float32_rounds_once(
    monkeypatch: pytest.MonkeyPatch, prefix: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch_flash, "faster_in_float32", lambda dtype: dtype != torch.float32)
    monkeypatch.setattr(prefill_attention, "BLOCK_TOKENS", 20)
    q, k, v = tensors(MIN_ROWS, prefix, 2, 2, 64, dtype)
    out, lse = run(q, k, v, prefix, "torch")
    want_out, want_lse = exact(q, k, v, prefix)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert_rounded(out, want_out, 5e-6, dtype)


def test_only_16_bit_types_are_candidates_for_float32() -> None:
    assert not faster_in_float32(torch.float32)
    assert not faster_in_float32(torch.float64)


def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(clock))
    taken = []

    def slow(name: str, seconds: int):
        def attend(*args, **kwargs):
            taken.append(name)
            for _ in range(seconds):
                next(clock)

        return attend

    for seconds, chosen in ((2, "native"), (0, "torch_flash")):
        monkeypatch.setattr(cpu.native, "prefill", slow("native", 1))
        monkeypatch.setattr(cpu.torch_flash, "prefill", slow("torch_flash", seconds))
        cpu.faster_in_torch.cache_clear()
        cpu.faster_in_torch(torch.float32)
        taken.clear()
        cpu.prefill(torch.empty(1, 1, 16), (), *torch.empty(2, 1, 1, 16), sm_scale=1.0)
        assert taken == [chosen]
    cpu.faster_in_torch.cache_clear()


@pytest.mark.parametrize("way", ["reference", "torch", "torch in float32", "cpu"])
@pytest.mark.parametrize("prefix", [1, 32, 75])
def test_blocks_through_one_buffer_are_the_whole_prefix_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, prefix: int, way: str
) -> None:
    backend, _, wide = way.partition(" in ")
    monkeypatch.setattr(prefill_attention, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(torch_flash, "faster_in_float32", lambda dtype: bool(wide))
    monkeypatch.setattr(cpu, "faster_in_torch", lambda dtype: False)
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
