"""Runs a transformers model in this process, every policy on the same prefilled contexts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_psa.evaluate.arena import Arena
from sgl_psa.evaluate.example import Example, TextExample
from sgl_psa.evaluate.feeder import Answering, Forced
from sgl_psa.evaluate.measurement import Measurement, Progress, questions
from sgl_psa.evaluate.paged_model import PAGE_SIZE, PagedModel, Row
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.prompt import Prompt
from sgl_psa.evaluate.tasks import Task
from sgl_psa.stats import ReadCounts

_SUMS = (
    "bytes_read",
    "pages_attended",
    "pages_total",
    "visits",
    "rounds",
    "coverage",
)


class InProcess:
    """Contexts are prefilled densely; questions and answers are decoded under the policy."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        folder: Path,
        chat: bool,
        batch: int = 64,
        page_size: int = PAGE_SIZE,
        share_heads: bool = True,
        arena: Arena | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model of transformers.
            name: what results call it.
            folder: where it came from, if it is a folder: its content is told apart.
            chat: use the tokenizer's chat template.
            batch: most rows decoded together.
            page_size, share_heads, arena: as of :class:`PagedModel`; results tell other than the
                defaults apart.
        """
        self.model = model.eval()
        self.prompt = Prompt(tokenizer, chat)
        self.batch = batch
        self.page_size = page_size
        self.share_heads = share_heads
        self.arena = arena
        kind = "in process"
        kind += "" if page_size == PAGE_SIZE else f", pages of {page_size}"
        kind += "" if share_heads else ", query heads apart"
        kind += "" if arena is None else f", {arena}"
        self.identity = {"model": name, "fingerprint": fingerprint(folder), "runner": kind}
        self._eos = _eos_ids(model, tokenizer)

    def refuses(self, task: Task, spec: PolicySpec) -> str | None:
        return None

    def measure(
        self,
        examples: Sequence[Example | TextExample],
        specs: Sequence[PolicySpec],
        progress: Progress,
    ) -> list[Measurement]:
        groups = list({repr(spec.server_settings()): spec.config for spec in specs}.items())
        contexts = [self._context_ids(example) for example in examples]
        longest = max(
            feeder.longest() for example in examples for feeder, _ in self._feeders(example, 1)
        )
        paged = PagedModel(
            self.model,
            [config for _, config in groups],
            max_context=max(map(len, contexts)),
            max_rows=self.batch,
            max_tail=longest,
            page_size=self.page_size,
            share_heads=self.share_heads,
            arena=self.arena,
        )
        results = [Measurement() for _ in specs]
        for example, ids in zip(examples, contexts, strict=True):
            paged.prefill(ids)
            for (key, _), group in zip(groups, paged.groups, strict=True):
                jobs = [
                    (result, Row(feeder, spec.rule(), prefix))
                    for spec, result in zip(specs, results, strict=True)
                    if repr(spec.server_settings()) == key
                    for feeder, prefix in self._feeders(example, len(ids))
                ]
                jobs.sort(key=lambda job: job[1].feeder.longest())
                for first in range(0, len(jobs), self.batch):
                    some = jobs[first : first + self.batch]
                    paged.decode(group, [row for _, row in some])
                    for result, row in some:
                        progress(_add(result, row, paged.repeats))
            for result in results:
                result.queries += questions(example)
        return results

    def _context_ids(self, example: Example | TextExample) -> list[int]:
        if isinstance(example, TextExample):
            return list(example.ids[: example.spans[-1][0]])
        return self.prompt.context_ids(example)

    def _feeders(
        self, example: Example | TextExample, length: int
    ) -> Iterator[tuple[Answering | Forced, int]]:
        """Every row of an example, with the tokens of the context that it continues."""
        if isinstance(example, TextExample):
            for start, stop in example.spans:
                yield Forced(example.ids[start:stop], example.ids[start - 1]), start - 1
        else:
            for query in example.queries:
                yield Answering(self.prompt, query, self._eos), length


def _add(result: Measurement, row: Row, repeats: int) -> int:
    """Add a finished row; the number of questions that it answered.

    Dense attention reads once for the ``repeats`` heads that select apart.
    """
    feeder = row.feeder
    assert isinstance(row.counts, torch.Tensor)
    sums = ReadCounts(*row.counts.sum(0).tolist())  # type: ignore[arg-type]
    result.reads.add(
        estimates=sums.estimates,
        bytes_attended=row.bytes_attended,
        bytes_dense=sums.bytes_dense / repeats,
        **{name: float(getattr(sums, name)) for name in _SUMS},
    )
    result.heads = row.heads + result.heads
    result.head_pages += row.pages
    result.head_steps += row.steps
    if isinstance(feeder, Forced):
        result.losses += feeder.losses
        return 1
    assert isinstance(feeder, Answering)
    scores = feeder.scores()
    result.grades += scores
    return len(scores)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    found = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [*found, tokenizer.eos_token_id] if i is not None)


def fingerprint(folder: Path) -> str:
    """Tells two contents of the same model folder apart; empty if there is no folder."""
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 24))
    return digest.hexdigest()[:12]


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or a hub name.

    Args:
        dtype: a torch dtype's name, or ``auto``: the checkpoint's own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(name, dtype=chosen).to(device), tokenizer
