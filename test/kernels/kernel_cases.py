"""Batches of the kernel tests: poisoned pools, ragged rows, and float64 truths."""

from dataclasses import dataclass

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """Shape of a batch."""

    dtype: torch.dtype
    head_dim: int
    page_size: int
    num_kv_heads: int
    group: int
    lens: tuple[int, ...]

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind}-D{self.head_dim}-P{self.page_size}-Hkv{self.num_kv_heads}-G{self.group}-"
            + "_".join(map(str, self.lens))
        )


CASES = (
    Case(BF16, 128, 16, 2, 4, (0, 1, 15, 16, 17, 700)),
    Case(BF16, 64, 32, 1, 7, (5, 0, 333)),
    Case(BF16, 256, 16, 2, 5, (129,)),
    Case(BF16, 16, 4, 2, 6, (3, 61, 0)),
    Case(BF16, 96, 16, 8, 1, (47, 400)),
    Case(FP16, 80, 16, 3, 1, (100, 16)),
    Case(FP16, 128, 64, 2, 8, (64, 65, 640)),
    Case(FP16, 64, 16, 4, 2, (209,)),
    Case(FP32, 96, 16, 2, 3, (250, 31)),
    Case(FP32, 256, 32, 1, 2, (130, 7)),
    Case(FP32, 128, 1, 1, 4, (1, 37)),
    Case(FP32, 48, 128, 2, 3, (300,)),
)


@dataclass
class Batch:
    """Tensors of a case. Slots that no row uses hold NaN, page table entries behind a row's last
    page hold numbers far outside of the pool."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def num_pages(self) -> int:
        return self.k.shape[0] // self.case.page_size

    @property
    def sm_scale(self) -> float:
        return self.case.head_dim**-0.5

    def pages(self, row: int) -> torch.Tensor:
        """Physical pages of a row, int64."""
        count = -(-self.case.lens[row] // self.case.page_size)
        return self.page_table[row, :count].long()

    def slots(self, row: int) -> torch.Tensor:
        """Slots of a row's tokens, int64."""
        size = self.case.page_size
        slots = self.pages(row)[:, None] * size + torch.arange(size)
        return slots.flatten()[: self.case.lens[row]]


def make_batch(case: Case, seed: int = 0, spread: float = 1.5) -> Batch:
    """A random batch; q is a strided view, as a slice of a fused projection is."""
    rng = torch.Generator().manual_seed(seed)
    counts = [-(-length // case.page_size) for length in case.lens]
    num_pages = 1 + sum(counts) + 2
    shape = (num_pages * case.page_size, case.num_kv_heads, case.head_dim)
    k = torch.full(shape, float("nan"), dtype=case.dtype)
    v = k.clone()
    order = torch.randperm(num_pages - 1, generator=rng) + 1
    garbage = torch.tensor([2**30, -7, -(2**31), 123456789])
    page_table = garbage[torch.arange(len(case.lens) * (max(counts) + 3)) % 4].to(torch.int32)
    page_table = page_table.view(len(case.lens), -1)
    used = 0
    for row, (length, count) in enumerate(zip(case.lens, counts, strict=True)):
        pages = order[used : used + count]
        used += count
        page_table[row, :count] = pages.to(torch.int32)
        slots = (pages[:, None] * case.page_size + torch.arange(case.page_size)).flatten()
        slots = slots[:length]
        size = (length, *shape[1:])
        k[slots] = torch.randn(size, generator=rng).to(case.dtype)
        v[slots] = torch.randn(size, generator=rng).to(case.dtype)
    heads = case.num_kv_heads * case.group
    fused = spread * torch.randn(len(case.lens), heads + 2, case.head_dim, generator=rng)
    q = fused.to(case.dtype)[:, 1 : heads + 1]
    seq_lens = torch.tensor(case.lens, dtype=torch.int32)
    return Batch(case, q, k, v, page_table, seq_lens)


def true_log_mass(batch: Batch) -> torch.Tensor:
    """Exact log mass of every page, float64 [B, Hq, max_pages]; NaN where there is no page."""
    case = batch.case
    heads = case.num_kv_heads * case.group
    truth = torch.full((len(case.lens), heads, batch.page_table.shape[1]), float("nan")).double()
    for row in range(len(case.lens)):
        keys = batch.k[batch.slots(row)].double()
        q = batch.q[row].double().unflatten(0, (case.num_kv_heads, case.group))
        logits = batch.sm_scale * torch.einsum("hgd,thd->hgt", q, keys).flatten(0, 1)
        for j, part in enumerate(logits.split(case.page_size, dim=1)):
            truth[row, :, j] = torch.logsumexp(part, dim=1)
    return truth


def assert_rounded(
    got: torch.Tensor, exact: torch.Tensor, noise: float, dtype: torch.dtype
) -> None:
    """``got`` is ``exact`` rounded to ``dtype``, up to float32 noise before the rounding."""
    unit = torch.finfo(dtype).eps / 2 if dtype != FP32 else 0.0
    error = (got.double() - exact.double()).abs()
    bound = 1.001 * unit * exact.double().abs() + noise
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert torch.isfinite(got).all()
    assert worst <= 0, f"error exceeds its bound by {float(worst):.3e}"
