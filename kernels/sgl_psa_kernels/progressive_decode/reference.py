"""Progressive decode attention in plain torch: the specification."""

import math
from dataclasses import dataclass, field

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.merge_state.reference import merge_state
from sgl_psa_kernels.progressive_decode.modes import (
    CONSERVATIVE,
    COVERAGE,
    DENSE,
    MARGINAL,
    NUM_STATS,
)

INF = float("inf")


@dataclass
class HeadRow:
    """One row and KV head: its queries, its keys and values by page, and what was attended."""

    q: torch.Tensor  # [G, D], scaled by sm_scale
    keys: list[torch.Tensor]  # per logical page [tokens, D]
    values: list[torch.Tensor]
    out: torch.Tensor = field(init=False)  # [G, D]
    lse: torch.Tensor = field(init=False)  # [G], LP_h
    attended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = torch.zeros_like(self.q)
        self.lse = torch.full_like(self.q[:, 0], -INF)

    def attend(self, pages: list[int]) -> torch.Tensor:
        """Attend pages exactly, merge them, and return their log masses L [G, len(pages)]."""
        logits = [self.q @ self.keys[page].T for page in pages]
        joint = torch.cat(logits, dim=1)
        lse = torch.logsumexp(joint, dim=1)
        weights = torch.exp(joint - lse.unsqueeze(1))
        out = weights @ torch.cat([self.values[page] for page in pages])
        self.out, self.lse = merge_state(self.out, self.lse, out, lse)
        self.attended += pages
        return torch.stack([torch.logsumexp(part, dim=1) for part in logits], dim=1)


@dataclass(frozen=True)
class Rule:
    """The stop rule of one row."""

    mode: int
    threshold: float
    kappa_floor: float
    kappa_std: float


@dataclass
class Residuals:
    """Exact minus estimated log masses of attended pages, one list a query head.

    Estimates of +inf, NaN and -inf are no estimates; their pages do not count.
    """

    rule: Rule
    values: list[torch.Tensor]

    @classmethod
    def none(cls, rule: Rule, log_mass: torch.Tensor) -> "Residuals":
        """No residuals yet, for the query heads of log_mass [G, pages]."""
        return cls(rule, list(log_mass[:, :0]))

    def add(self, exact: torch.Tensor, estimate: torch.Tensor) -> None:
        """Add the pages of exact, estimate [G, pages]."""
        for h, (x, e) in enumerate(zip(exact, estimate, strict=True)):
            known = torch.isfinite(e)
            self.values[h] = torch.cat([self.values[h], x[known] - e[known]])

    def sums(self) -> torch.Tensor:
        """Count, sum and sum of squares, [G, 3]."""
        return torch.stack(
            [torch.stack([x.new_tensor(len(x)), x.sum(), x.square().sum()]) for x in self.values]
        )

    def correction(self) -> torch.Tensor:
        """kappa [G]: mean + kappa_std * standard deviation, at least kappa_floor."""
        kappa = torch.stack(
            [
                x.mean() + self.rule.kappa_std * x.std(correction=0) if len(x) else x.new_zeros(())
                for x in self.values
            ]
        )
        return kappa.clamp(min=self.rule.kappa_floor)


def select_and_attend(
    head: HeadRow,
    log_mass: torch.Tensor,
    rule: Rule,
    sink_pages: int,
    recent_pages: int,
    group_pages: int,
    group_percent: int,
    first_pages: int,
    kappa_start: torch.Tensor | None,
) -> tuple[list[float], torch.Tensor]:
    """The progressive loop for log_mass [G, n] and kappa_start [G].

    Returns the statistics, and the sums [G, 3] of the residuals under a coverage rule.
    """
    n = log_mass.shape[1]
    # A page whose estimate is +inf or NaN in any head has no usable estimate.
    stale = (~(log_mass < INF)).any(0).tolist()
    forced = [
        page
        for page in range(n)
        if page < sink_pages or page >= n - max(recent_pages, 1) or stale[page]
    ]
    exact = head.attend(forced)
    residuals, seen = Residuals.none(rule, log_mass), Residuals.none(rule, log_mass)
    kappa = torch.zeros_like(head.lse)
    lowest = torch.full_like(head.lse, -INF) if kappa_start is None else kappa_start
    fresh = [i for i, page in enumerate(forced) if not stale[page]]
    if rule.mode in (COVERAGE, CONSERVATIVE):
        seen.add(exact[:, fresh], log_mass[:, [forced[i] for i in fresh]])
    if rule.mode == CONSERVATIVE:
        residuals = seen
        kappa = torch.maximum(residuals.correction(), lowest)
    elif rule.mode == COVERAGE and kappa_start is not None:
        kappa = kappa_start.clamp(min=rule.kappa_floor)
    remaining = [page for page in range(n) if page not in set(forced)]
    scored = len(remaining)

    rounds = 0
    if remaining:
        log_total = torch.logaddexp(head.lse, torch.logsumexp(log_mass[:, remaining], dim=1))
        key = (log_mass - log_total.unsqueeze(1)).amax(0).tolist()
        remaining.sort(key=lambda page: (-key[page], page))
    while remaining:
        size = max(group_pages, len(head.attended) * group_percent // 100)
        if not rounds:
            size = max(size, first_pages - len(head.attended))
        if rule.mode == MARGINAL:
            worth = (log_mass > (head.lse + rule.threshold).unsqueeze(1)).any(0)
            group = [page for page in remaining if worth[page]][:size]
            if not group:
                break
            head.attend(group)
        else:
            left = torch.logsumexp(log_mass[:, remaining], dim=1)
            if bool((left + kappa <= head.lse + rule.threshold).all()):
                break
            group = remaining[:size]
            exact = head.attend(group)
            seen.add(exact, log_mass[:, group])
            if rule.mode == COVERAGE:
                residuals = Residuals.none(rule, log_mass)
                residuals.add(exact, log_mass[:, group])
            kappa = torch.maximum(residuals.correction(), lowest)
        rounds += 1
        remaining = [page for page in remaining if page not in set(group)]

    coverage = 1.0
    if remaining:
        left = torch.logsumexp(log_mass[:, remaining], dim=1) + kappa
        coverage = float(torch.sigmoid(head.lse - left).min())
    tokens = sum(len(head.keys[page]) for page in head.attended)
    return [len(head.attended), tokens, scored, rounds, coverage, sum(stale)], seen.sums()


def progressive_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    log_mass: torch.Tensor | None,
    mode: torch.Tensor,
    threshold: torch.Tensor,
    kappa_floor: torch.Tensor,
    kappa_std: torch.Tensor,
    *,
    page_size: int,
    sm_scale: float,
    sink_pages: int,
    recent_pages: int,
    group_pages: int,
    group_percent: int = 0,
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`.

    Float64 queries and caches compute in float64 and return a float64 lse.
    """
    op = "progressive_decode"
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_qo_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    num_pages = k_cache.shape[0] // page_size
    group = num_qo_heads // num_kv_heads
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((batch, num_qo_heads), -INF, dtype=work)
    stats = torch.zeros(batch, num_kv_heads, NUM_STATS)
    if attended is not None:
        attended.zero_()
    if residuals is not None:
        residuals.zero_()
    for b in range(batch):
        seq_len = int(seq_lens[b])
        n = checks.check_row_length(op, b, seq_len, page_table.shape[1], page_size)
        rule = Rule(int(mode[b]), *(float(t[b]) for t in (threshold, kappa_floor, kappa_std)))
        checks.require(
            rule.mode in (DENSE, MARGINAL, COVERAGE, CONSERVATIVE),
            f"{op}: mode[{b}] must be 0 (dense), 1 (marginal), 2 (coverage) or 3 (conservative), "
            f"got {rule.mode}",
        )
        checks.require(not math.isnan(rule.threshold), f"{op}: threshold[{b}] is not a number")
        checks.require(
            rule.mode == DENSE or log_mass is not None,
            f"{op}: row {b} has mode {rule.mode} and needs log_mass; score the pages first",
        )
        if n == 0:
            continue
        pages = page_table[b, :n].tolist()
        checks.require(
            all(0 <= page < num_pages for page in pages),
            f"{op}: page_table[{b}] names pages outside of the pool of {num_pages} pages",
        )
        for h in range(num_kv_heads):
            heads = slice(h * group, (h + 1) * group)
            head = HeadRow(
                q[b, heads].to(work) * sm_scale,
                page_rows(k_cache[:, h], pages, seq_len, page_size, work),
                page_rows(v_cache[:, h], pages, seq_len, page_size, work),
            )
            if rule.mode == DENSE or log_mass is None:
                head.attend(list(range(n)))
                row_stats = [float(n), float(seq_len), 0.0, 0.0, 1.0, 0.0]
            else:
                estimates = log_mass[b, heads, :n].to(work)
                row_stats, sums = select_and_attend(
                    head,
                    estimates,
                    rule,
                    sink_pages,
                    recent_pages,
                    group_pages,
                    group_percent,
                    0 if first_pages is None else int(first_pages[b, h]),
                    None if kappa_start is None else kappa_start[b, heads].to(work),
                )
                if residuals is not None:
                    residuals[b, heads] = sums.to(residuals.dtype)
            out[b, heads] = head.out.to(q.dtype)
            lse[b, heads] = head.lse
            if attended is not None:
                attended[b, h, head.attended] = 1
            stats[b, h] = torch.tensor(row_stats, dtype=torch.float32)
    return out, lse, stats


def page_rows(
    rows: torch.Tensor, pages: list[int], seq_len: int, page_size: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Split rows [slots, D] by logical page; the last page holds only the tokens in use."""
    parts = []
    for j, page in enumerate(pages):
        tokens = min(page_size, seq_len - j * page_size)
        first = page * page_size
        parts.append(rows[first : first + tokens].to(dtype))
    return parts
