"""StreamingLLM (arXiv 2309.17453): the sink pages and the last ones, whatever they hold."""

from __future__ import annotations

import torch

from sgl_psa.policies.base import Candidates, Policy, chosen_row


def select(candidates: Candidates) -> torch.Tensor:
    """The last pages that ``budget`` allows beside the sinks."""
    page = torch.arange(candidates.exists.shape[-1], device=candidates.exists.device)
    last = candidates.budget - candidates.sink_pages
    return (candidates.exists & (page >= candidates.pages - last)).expand_as(candidates.forced)


WINDOW = Policy("window", chosen_row, limit="budget", select=select, reads_scores=False)
