"""Budget prediction: how many pages a stop rule will read, so that one round usually suffices.

Per (request, layer, KV head) an online quantile of the page count n* at which the rule stopped:

    log n_hat += eta * (1[n* > ceil(n_hat)] - (1 - rho))

In the long run n* exceeds ceil(n_hat), the prediction, in a share 1 - rho of the steps, or in less
where even the pages that are read anyway suffice. The state is in log pages, so a step changes it
by a factor whatever its size. A new request starts from the prior of its context length, or from
the state of the request whose prefix it shares. Source:
quantile tracking by stochastic approximation (Robbins and Monro 1951), as in adaptive conformal
prediction (Gibbs and Candes, arXiv 2106.00170).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class PriorError(ValueError):
    """A prior file that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class BudgetPrior:
    """Page counts of a model under one stop rule, by context length.

    Attributes:
        pages: int64 [N], context lengths in pages, increasing.
        log_needed: float32 [N, L, Hkv], log of the ``rho``-quantile of n* at that length.
        about: what it was measured with: model, rule, scorer, page size, rho.
    """

    pages: torch.Tensor
    log_needed: torch.Tensor
    about: dict[str, Any]

    def at(self, pages: torch.Tensor) -> torch.Tensor:
        """Log page counts for contexts of ``pages`` [B] pages: float32 [B, L, Hkv].

        Linear in log length between the measured lengths, constant outside of them.
        """
        known = self.pages.to(torch.float32).log()
        x = pages.to(torch.float32).clamp(min=1).log().clamp(known[0], known[-1])
        right = torch.searchsorted(known, x).clamp(1, max(len(known) - 1, 1))
        if len(known) == 1:
            return self.log_needed.expand(len(x), -1, -1)
        left = right - 1
        share = ((x - known[left]) / (known[right] - known[left]))[:, None, None]
        return self.log_needed[left] * (1 - share) + self.log_needed[right] * share

    def save(self, path: Path) -> None:
        """Write the prior as JSON."""
        document = {
            "format": FORMAT,
            "about": self.about,
            "pages": self.pages.tolist(),
            "log_needed": self.log_needed.tolist(),
        }
        path.write_text(json.dumps(document) + "\n")

    @classmethod
    def load(cls, path: Path, num_layers: int, num_kv_heads: int) -> BudgetPrior:
        """Read a prior for a cache of this shape.

        Raises:
            PriorError: unreadable, of another format, or of another model's shape.
        """
        advice = "write it anew with python -m sgl_psa.calibrate"
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise PriorError(f"budget prior {path}: {error}; {advice}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PriorError(f"budget prior {path}: not of format {FORMAT}; {advice}")
        try:
            pages = torch.tensor(document["pages"], dtype=torch.int64)
            log_needed = torch.tensor(document["log_needed"], dtype=torch.float32)
            about = dict(document["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise PriorError(f"budget prior {path}: damaged ({error!r}); {advice}") from None
        if log_needed.ndim != 3 or pages.shape != log_needed.shape[:1] or not len(pages):
            raise PriorError(f"budget prior {path}: damaged (sizes do not agree); {advice}")
        if log_needed.shape[1:] != (num_layers, num_kv_heads):
            raise PriorError(
                f"budget prior {path} is for {list(log_needed.shape[1:])} layers and KV heads, the "
                f"model has {[num_layers, num_kv_heads]}; {advice} --model MODEL"
            )
        return cls(pages, log_needed, about)

    def heads(self, first: int, count: int) -> BudgetPrior:
        """The part of KV heads ``first`` to ``first + count``, for one tensor-parallel rank."""
        part = self.log_needed[..., first : first + count].contiguous()
        return replace(self, log_needed=part)

    def to(self, device: torch.device | str) -> BudgetPrior:
        """The same on ``device``."""
        return replace(self, pages=self.pages.to(device), log_needed=self.log_needed.to(device))

    def differences(self, **settings: Any) -> list[str]:
        """What it was measured with where that is not as in ``settings``; empty if all agree."""
        return [
            f"{name} {self.about.get(name)!r} instead of {value!r}"
            for name, value in settings.items()
            if self.about.get(name) != value
        ]


class BudgetState:
    """Predictions of every request slot; all operations stay on the device.

    Attributes:
        log_needed: float32 [slots, L, Hkv].
        generation: int64 [slots], of the request whose state a slot holds; -1 before the first.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        *,
        rho: float = 0.97,
        eta: float = 0.2,
        least: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            rho: share of steps that the prediction should suffice for, in (0, 1).
            eta: step size, in nats, above 0.
            least: pages that the first round reads whatever is predicted, at least 1.

        Raises:
            ValueError: ``rho``, ``eta`` or ``least`` out of range.
        """
        if not 0 < rho < 1 or not eta > 0 or least < 1:
            raise ValueError(
                "BudgetState: 0 < rho < 1, eta > 0 and least >= 1 needed, "
                f"got {rho}, {eta} and {least}"
            )
        self.rho = rho
        self.eta = eta
        self.log_least = math.log(least)
        self.log_needed = torch.empty(0, num_layers, num_kv_heads, device=device)
        self.generation = torch.empty(0, dtype=torch.int64, device=device)
        self.reserve(num_slots)

    def reserve(self, num_slots: int) -> None:
        """Make room for ``num_slots`` slots; those that exist keep their state."""
        more = num_slots - len(self.generation)
        if more > 0:
            blank = self.log_needed.new_full((more, *self.log_needed.shape[1:]), self.log_least)
            self.log_needed = torch.cat([self.log_needed, blank])
            self.generation = torch.cat([self.generation, self.generation.new_full((more,), -1)])

    def start(
        self,
        slots: torch.Tensor,
        generation: torch.Tensor,
        pages: torch.Tensor,
        prior: BudgetPrior | None = None,
    ) -> torch.Tensor:
        """Start the requests that are new in their slots; the others keep their state.

        Args:
            slots: int64 [B]; a slot that is named twice must be named for the same request.
            generation: int64 [B], differs from the slot's last where another request took it.
            pages: [B], pages of each context.
            prior: on the state's device; ``None``: start from ``least``.

        Returns:
            Which rows are new, bool [B].
        """
        old = self.log_needed[slots]
        first = torch.full_like(old, self.log_least)
        if prior is not None:
            first = prior.at(pages).clamp(min=self.log_least)
        fresh = self.generation[slots] != generation
        self.log_needed[slots] = torch.where(fresh[:, None, None], first, old)
        self.generation[slots] = generation
        return fresh

    def snapshot(self, slot: int) -> torch.Tensor:
        """The state of one request, float32 [L, Hkv]."""
        return self.log_needed[slot].clone()

    def inherit(self, slot: int, generation: int, snapshot: torch.Tensor) -> None:
        """Start the request in ``slot`` from the snapshot of the prefix that it shares."""
        self.reserve(slot + 1)
        self.log_needed[slot] = snapshot
        self.generation[slot] = generation

    def predict(self, slots: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Pages to read at once, int32 [L, B, Hkv]: ``least`` up to the context's ``pages`` [B]."""
        n = _whole_pages(self.log_needed[slots]).to(torch.int32)
        return torch.minimum(n, pages.to(torch.int32)[:, None, None]).transpose(0, 1).contiguous()

    def update(self, slots: torch.Tensor, short: torch.Tensor, valid: torch.Tensor) -> None:
        """Learn from one step.

        Args:
            slots: int64 [B].
            short: bool [L, B, Hkv], whether the predicted pages did not suffice. It is all that
                can be seen: how many fewer would have sufficed is hidden in the first round.
            valid: bool [B], rows that decoded sparsely, each in a slot of its own; the others
                teach nothing.
        """
        old = self.log_needed[slots]
        change = self.eta * (short.transpose(0, 1).to(old.dtype) - (1 - self.rho))
        # A state below what is read anyway would only take time to come back.
        change = torch.maximum(change, self.log_least - old)
        self.log_needed.index_add_(0, slots, torch.where(valid[:, None, None], change, 0.0))


def _whole_pages(log_needed: torch.Tensor) -> torch.Tensor:
    """Page counts, at least 1; the log of a whole number gives that number in spite of rounding."""
    return torch.ceil(log_needed.exp() * (1 - 1e-5)).clamp(min=1)


def log_quantile(needed: torch.Tensor, rho: float) -> torch.Tensor:
    """Log of the ``rho``-quantile over the first dimension of n* [N, ...], float32 [...].

    The smallest observed value that at least a share ``rho`` of the observations does not exceed.
    """
    ordered = needed.to(torch.float32).sort(0).values
    return ordered[max(math.ceil(rho * len(ordered)) - 1, 0)].clamp(min=1).log()
