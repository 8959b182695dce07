"""Runs a transformers model in this process, every policy on the same prefilled contexts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_psa.evaluate.example import Example, TextExample
from sgl_psa.evaluate.feeder import Answering, Forced
from sgl_psa.evaluate.measurement import Measurement, Progress, questions
from sgl_psa.evaluate.paged_model import PagedModel, Row
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.prompt import Prompt
from sgl_psa.evaluate.tasks import Task
from sgl_psa.stats import ReadCounts

_SUMS = (
    "bytes_read",
    "bytes_dense",
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
    ) -> None:
        """
        Args:
            model: a causal language model of transformers.
            name: what results call it.
            folder: where it came from, if it is a folder: its content is told apart.
            chat: use the tokenizer's chat template.
            batch: most rows decoded together.
        """
        self.model = model.eval()
        self.prompt = Prompt(tokenizer, chat)
        self.batch = batch
        self.identity = {"model": name, "fingerprint": fingerprint(folder), "runner": "in process"}
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
                        progress(_add(result, row))
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


def _add(result: Measurement, row: Row) -> int:
    """Add a finished row; the number of questions that it answered."""
    feeder = row.feeder
    assert isinstance(row.counts, torch.Tensor)
    sums = ReadCounts(*row.counts.sum(0).tolist())  # type: ignore[arg-type]
    result.reads.add(
        estimates=sums.estimates,
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
