"""Budget prediction: how many pages a stop rule will read, so that one round usually suffices.

Per (request, layer, KV head) an online quantile of the page count n* at which the rule stopped:

    log n_hat += eta * (1[n* > ceil(n_hat)] - (1 - rho))

In the long run n* exceeds ceil(n_hat), the prediction, in a share 1 - rho of the steps. The state
is in log pages, so a step changes it by a factor whatever its size. A new request starts from the
prior of its context length, or from the state of the request whose prefix it shares. Source:
quantile tracking by stochastic approximation (Robbins and Monro 1951), as in adaptive conformal
prediction (Gibbs and Candes, arXiv 2106.00170).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
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
        log_needed = torch.tensor(document["log_needed"], dtype=torch.float32)
        if log_needed.shape[1:] != (num_layers, num_kv_heads):
            raise PriorError(
                f"budget prior {path} is for {list(log_needed.shape[1:])} layers and KV heads, the "
                f"model has {[num_layers, num_kv_heads]}; {advice}"
            )
        return cls(torch.tensor(document["pages"]), log_needed, document["about"])


class BudgetState:
    """Predictions of every request slot; all operations stay on the device.

    Attributes:
        log_needed: float32 [slots, L, Hkv].
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        *,
        rho: float = 0.97,
        eta: float = 0.2,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            rho: share of steps that the prediction should suffice for, in (0, 1).
            eta: step size, in nats, above 0.

        Raises:
            ValueError: ``rho`` or ``eta`` out of range.
        """
        if not 0 < rho < 1 or not eta > 0:
            raise ValueError(f"BudgetState: 0 < rho < 1 and eta > 0 needed, got {rho} and {eta}")
        self.rho = rho
        self.eta = eta
        self.log_needed = torch.zeros(num_slots, num_layers, num_kv_heads, device=device)

    def start(self, slots: torch.Tensor, pages: torch.Tensor, prior: BudgetPrior) -> None:
        """New requests in ``slots`` int64 [B] with contexts of ``pages`` [B] pages."""
        self.log_needed[slots] = prior.at(pages).to(self.log_needed.device)

    def snapshot(self, slot: int) -> torch.Tensor:
        """The state of one request, float32 [L, Hkv]; what a prefix node keeps."""
        return self.log_needed[slot].clone()

    def inherit(self, slot: int, snapshot: torch.Tensor) -> None:
        """Start the request in ``slot`` from the snapshot of the prefix that it shares."""
        self.log_needed[slot] = snapshot

    def predict(self, slots: torch.Tensor, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Pages to read at once, int64 [B, Hkv]: 1 up to the context's ``pages`` [B]."""
        n = _whole_pages(self.log_needed[slots, layer]).long()
        return torch.minimum(n, pages.long()[:, None])

    def update(
        self, slots: torch.Tensor, layer: int, needed: torch.Tensor, valid: torch.Tensor
    ) -> None:
        """Learn from one step.

        Args:
            slots: int64 [B], each slot at most once.
            needed: [B, Hkv], n*: pages at which the rule stopped, forced pages included.
            valid: bool [B], rows that decoded sparsely; the others teach nothing.
        """
        old = self.log_needed[slots, layer]
        short = needed.to(old.dtype) > _whole_pages(old)
        change = self.eta * (short.to(old.dtype) - (1 - self.rho))
        # n* is never below 1 page, so neither is its quantile.
        new = (old + change).clamp(min=0.0)
        self.log_needed[slots, layer] = torch.where(valid[:, None], new, old)


def _whole_pages(log_needed: torch.Tensor) -> torch.Tensor:
    """Page counts, at least 1; the log of a whole number gives that number in spite of rounding."""
    return torch.ceil(log_needed.exp() * (1 - 1e-5)).clamp(min=1)


def log_quantile(needed: torch.Tensor, rho: float) -> torch.Tensor:
    """Log of the ``rho``-quantile over the first dimension of n* [N, ...], float32 [...].

    The smallest observed value that at least a share ``rho`` of the observations does not exceed.
    """
    ordered = needed.to(torch.float32).sort(0).values
    return ordered[max(math.ceil(rho * len(ordered)) - 1, 0)].clamp(min=1).log()
