"""What each request read: ``meta_info["psa"]``, and ``metadata["psa"]`` of OpenAI responses.

In the scheduler every decode step leaves one tuple of sums a row in SGLang's ``customized_info``,
which follows the request's tokens through overlap, retraction and streaming. The tokenizer
process adds the tuples up into one dictionary for the request so far. Under tensor parallelism it
tells of the KV heads of rank 0.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from sgl_psa.rule import RequestRule
from sgl_psa.stats import ReadCounts, StepStats
from sglang_psa import compat, metrics, state
from sglang_psa.decode_graph import LateSteps, LateTable
from sglang_psa.hooks import Hook, Kind
from sglang_psa.request_rules import rule_of
from sglang_psa.server_args import uses_psa

KEY = "psa"
#: Sums of one row of one decode step, in the order of ``ReadCounts``; ``None`` for prefill.
RowSums = tuple[float, ...] | None


_late = LateSteps()


def row_sums(step: StepStats | None, num_rows: int) -> Sequence[RowSums]:
    """The sums of each row of a step, over layers and KV heads; ``None``s if it was no decode.

    Of a CUDA device they are fetched when SGLang looks at the first of them.
    """
    return [None] * num_rows if step is None else LateTable(step.table.sum(0))


def publish(output: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """After each forward pass: hand the step's statistics to its requests and to the metrics."""
    backend = state.get_backend()
    if backend is None:
        return
    step = backend.take_step()
    known = None if step is None else _late.swap(step)
    if known is not None:
        metrics.observe(known)
    logits = output.logits_output
    if hasattr(logits, "customized_info"):
        rows = row_sums(step, forward_batch.batch_size)
        logits.customized_info = {**(logits.customized_info or {}), KEY: rows}


class RequestReads:
    """What one request read so far."""

    def __init__(self, rule: RequestRule, scorer: str) -> None:
        self.rule = rule
        self.scorer = scorer
        self.decode_steps = 0
        self.counts = ReadCounts()
        self._taken = 0

    def take(self, tokens: Sequence[RowSums]) -> None:
        """Add what is new in ``tokens``: one entry a token of the request, from its first on."""
        for sums in tokens[self._taken :]:
            if sums is not None:
                self.decode_steps += 1
                self.counts.add(ReadCounts(*sums))  # type: ignore[arg-type]
        self._taken = len(tokens)

    def as_dict(self) -> dict[str, Any]:
        """``meta_info["psa"]``: sums over layers and KV heads, and what follows from them.

        The fractions and means are ``None`` while no decode step has run: a request whose only
        token came from prefill has read nothing sparsely. ``stop`` names what ends reading
        (``coverage``, ``marginal``, ``change`` or ``budget``) and ``knob`` its number. ``coverage``
        is an estimate by the scores; a policy that reads none has ``None``. ``one_round`` is the
        share of (step, layer, KV head) that took one round at most; ``None`` where no stop rule
        ends reading.
        """
        counts, ran = self.counts, self.decode_steps > 0
        return {
            "policy": self.rule.policy,
            "stop": self.rule.limit,
            "knob": self.rule.knob,
            "scorer": self.scorer,
            "decode_steps": self.decode_steps,
            "pages_fraction": counts.pages_attended / counts.pages_total if ran else None,
            "bytes_fraction": counts.bytes_read / counts.bytes_dense if ran else None,
            "coverage": counts.mean_coverage,
            "rounds": counts.rounds / counts.visits if ran else None,
            "one_round": counts.one_round,
            "pages_attended": int(counts.pages_attended),
            "pages_total": int(counts.pages_total),
            "bytes_read": int(counts.bytes_read),
            "bytes_dense": int(counts.bytes_dense),
            "stale_pages": int(counts.stale_pages),
        }


async def summarise(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Around the response of one request: put the dictionary in the place of the raw tuples."""
    ours = uses_psa(manager.server_args) and hasattr(obj, "stream")
    if ours:
        tokens = manager.rid_to_state[obj.rid].customized_info_accumulated
        rule = rule_of(manager, obj.sampling_params)
        reads = RequestReads(rule, manager.server_args.psa_scorer)
    async with aclosing(original(manager, obj, request)) as outputs:
        async for output in outputs:
            if ours:
                reads.take(tokens.get(KEY, ()))
                output["meta_info"][KEY] = reads.as_dict()
            yield output


def add_metadata(
    response: Any, serving: Any, request: Any, ret: list[dict[str, Any]], *args: Any, **kwargs: Any
) -> None:
    """Copy it to an OpenAI response: a dictionary, or a list of one a choice if there are several.

    Only responses that are not streamed have a ``metadata`` field.
    """
    metadata = getattr(response, "metadata", None)
    found = [one["meta_info"][KEY] for one in ret if KEY in one["meta_info"]]
    if metadata is not None and found:
        metadata[KEY] = found[0] if len(found) == 1 else found


HOOKS = (
    Hook("statistics of requests", compat.MODEL_FORWARD, publish, Kind.AFTER),
    Hook("meta_info", compat.WAIT_ONE_RESPONSE, summarise, Kind.AROUND, "main"),
    Hook("chat metadata", compat.BUILD_CHAT_RESPONSE, add_metadata, Kind.AFTER, "main"),
    Hook("completion metadata", compat.BUILD_COMPLETION_RESPONSE, add_metadata, Kind.AFTER, "main"),
)
