"""Budget predictions and the prefix cache: kept with the nodes of the radix tree, gone with them.

When a request finishes, the nodes that hold its tokens get the state of its predictions; a node
that is evicted or flushed takes it along, both parts of a node that is split keep it. A request
that finds a prefix in the cache starts from the state of its deepest node that suits it. State
suits a request if the prefix that they share is at least half of either: page counts of a long
context say little about a short one that shares its system prompt, and too high a prediction takes
long to come down. Requests share prefixes only under the same rule (:mod:`sglang_psa.radix`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_psa import compat, state
from sglang_psa.hooks import Hook, Kind

if TYPE_CHECKING:
    from sgl_psa.budget import BudgetPrior
    from sgl_psa.config import PSAConfig
    from sgl_psa.prediction import Predictor, Snapshot

logger = logging.getLogger(__name__)

#: Attributes that this module gives to tree nodes, trees and requests of SGLang.
NODE, END, DECODED = "psa_budget", "psa_inserted", "psa_decoded"


class Learnt(NamedTuple):
    """What a node keeps: ``state`` of a request of ``tokens`` tokens."""

    state: Snapshot
    tokens: int


def follow(backend: Any, batch: Any, request: Any, slot: int, new: bool) -> None:
    """Before a forward pass of ``request``: let it inherit, and note whether it decodes.

    Args:
        new: whether the request has just taken ``slot``.
    """
    predictor = _predictor(backend)
    if predictor is None:
        return
    if new:
        setattr(request, DECODED, False)
        learnt = find(request)
        if learnt is not None:
            predictor.inherit(slot, backend.rules.generation(slot), learnt.state)
    if batch.forward_mode.is_decode():
        setattr(request, DECODED, True)


def find(request: Any) -> Learnt | None:
    """The state of the deepest node of the request's cached prefix that suits it."""
    node, depth = request.last_node, len(request.prefix_indices)
    length = len(request.origin_input_ids) + len(request.output_ids)
    while node is not None and 2 * depth >= length:
        learnt: Learnt | None = getattr(node, NODE, None)
        if learnt is not None and 2 * depth >= learnt.tokens:
            return learnt
        depth -= len(node.key)
        node = node.parent
    return None


def note_end(result: Any, tree: Any, *args: Any, **kwargs: Any) -> None:
    """After an insertion: remember the node where the inserted tokens end."""
    if _predictor(state.get_backend()) is not None:
        setattr(tree, END, result.last_device_node)


def keep(original: Callable[..., Any], tree: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the end of a request: give its state to the nodes that hold at least half of it."""
    backend = state.get_backend()
    predictor = _predictor(backend)
    if backend is None or predictor is None:
        return original(tree, request, *args, **kwargs)
    setattr(tree, END, None)
    result = original(tree, request, *args, **kwargs)
    node = getattr(tree, END)
    setattr(tree, END, None)
    tokens = kwargs["kv_len_to_handle"]
    # A slot's state is this request's only once it has decoded there.
    learns = getattr(request, DECODED, False) and tokens >= backend.wrapper.min_context
    if node is None or not learns:
        return result
    learnt = Learnt(predictor.snapshot(int(request.req_pool_idx)), tokens)
    depth = tokens // tree.page_size * tree.page_size
    while node.parent is not None and 2 * depth >= tokens:
        setattr(node, NODE, learnt)
        depth -= len(node.key)
        node = node.parent
    return result


def split(new_node: Any, tree: Any, key: Any, child: Any, *args: Any, **kwargs: Any) -> None:
    """After a split: the part in front keeps the state too; :func:`find` judges if it suits."""
    learnt = getattr(child, NODE, None)
    if learnt is not None:
        setattr(new_node, NODE, learnt)


def check_prior(config: PSAConfig, model_config: Any) -> None:
    """Refuse a prior at start-up, before the model is loaded.

    Raises:
        PriorError: it cannot be read, or is of a model of another shape.
    """
    if config.budget_prior:
        from sgl_psa.budget import BudgetPrior

        heads = model_config.get_total_num_kv_heads()
        BudgetPrior.load(Path(config.budget_prior), model_config.num_hidden_layers, heads)


def load_prior(config: PSAConfig, pool: Any, runner: Any) -> BudgetPrior | None:
    """The server's prior, of this rank's KV heads; warns if it was made with other settings.

    Raises:
        PriorError: it cannot be read, or is of a model of another shape.
    """
    if not config.budget_prior:
        return None
    from sgl_psa.budget import BudgetPrior
    from sgl_psa.prediction import prior_settings

    parallel, total = compat.get_parallel(), runner.model_config.get_total_num_kv_heads()
    prior = BudgetPrior.load(Path(config.budget_prior), pool.layer_num, total)
    others = prior.differences(**prior_settings(config, pool.page_size))
    if others:
        logger.warning(
            "--psa-budget-prior %s was made with %s: predictions start further off; write it anew "
            "with python -m sgl_psa.calibrate and the server's settings",
            config.budget_prior,
            ", ".join(others),
        )
    first = parallel.attn_tp_rank * total // parallel.attn_tp_size
    return prior.heads(first, pool.head_num)


def _predictor(backend: Any) -> Predictor | None:
    wrapper = getattr(backend, "wrapper", None)
    return getattr(wrapper, "predictor", None)


HOOKS = (
    Hook("end of a cached request", compat.INSERT_PREFIX, note_end, Kind.AFTER),
    Hook("budgets of a finished request", compat.CACHE_FINISHED_REQUEST, keep, Kind.AROUND),
    Hook("budgets of a split prefix", compat.SPLIT_PREFIX, split, Kind.AFTER),
)
