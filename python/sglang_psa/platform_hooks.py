"""Hooks for machines without an accelerator: SGLang assumes Triton, NCCL and pinned memory there.

They are registered only when this package's CPU platform is the active one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sglang_psa import compat, defaults
from sglang_psa.hooks import Hook, Kind

#: Capacity of the KV pool in tokens when the user limits neither tokens nor memory.
DEFAULT_MAX_TOKENS = 1 << 20


def support_triton(original: Callable[..., bool], backend: str) -> bool:
    """No backend has Triton here; SGLang decides by name and does not know ours."""
    return False if backend == "psa" else original(backend)


def init_model_parallel_group(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tensor parallelism over gloo alone."""
    kwargs["use_pynccl"] = False
    kwargs["use_custom_allreduce"] = False
    return original(*args, **kwargs)


def use_own_cores(result: None, *, local_omp_cpuid: str, **kwargs: Any) -> None:
    """Keep a rank on its cores: SGLang binds threads only where it has its AMX kernels.

    Args:
        local_omp_cpuid: this rank's part of ``SGLANG_CPU_OMP_THREADS_BIND``, such as ``0-3,8``.
    """
    if defaults.OMP_BIND not in os.environ:
        return
    import torch

    cores = parse_cores(local_omp_cpuid) & os.sched_getaffinity(0)
    if not cores:
        raise ValueError(
            f"{defaults.OMP_BIND}: none of the cores {local_omp_cpuid!r} may be used by this "
            f"process, which has {sorted(os.sched_getaffinity(0))}"
        )
    os.sched_setaffinity(0, cores)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(cores))


def parse_cores(text: str) -> set[int]:
    """Core numbers of a list such as ``0-3,8``."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def allocate_token_bitmask(vocab_size: int, batch_size: int) -> Any:
    """The grammar bitmask in ordinary memory: pinning needs CUDA and would end the scheduler."""
    import torch

    shape = compat.get_bitmask_shape(batch_size, vocab_size)
    return torch.full(shape, -1, dtype=torch.int32)


def apply_vocab_mask(grammar: Any, logits: Any, vocab_mask: Any) -> None:
    """Forbid the tokens whose bit is clear, in place; SGLang does this on accelerators only.

    Args:
        logits: [B, vocab or more], any float dtype.
        vocab_mask: int32 [B, words], bit i of word w is token 32 * w + i.
    """
    import torch

    bits = vocab_mask[..., None] >> torch.arange(32, dtype=torch.int32)
    forbidden = (bits & 1 == 0).flatten(1)[:, : logits.shape[1]]
    logits[:, : forbidden.shape[1]].masked_fill_(forbidden, float("-inf"))


def limit_tokens(tokens: int, configurator: Any, token_capacity: int) -> int | None:
    """Bound the page lists of small models, whose KV would fit in RAM by the ten million."""
    args = configurator.server_args
    if args.max_total_tokens is not None or getattr(args, "psa_host_pool_bytes", None):
        return None
    page = args.page_size
    return min(tokens, DEFAULT_MAX_TOKENS // page * page)


HOOKS = (
    (
        Hook("no Triton on CPU", compat.SUPPORT_TRITON, support_triton, Kind.AROUND, "any"),
        Hook(
            "gloo process groups",
            compat.INIT_MODEL_PARALLEL_GROUP,
            init_model_parallel_group,
            Kind.AROUND,
        ),
        Hook("cores of a rank", compat.INIT_CPU_THREADS, use_own_cores, Kind.AFTER),
        Hook(
            "unpinned grammar bitmask",
            compat.ALLOCATE_TOKEN_BITMASK,
            allocate_token_bitmask,
            Kind.REPLACE,
        ),
        Hook("grammar mask on CPU", compat.APPLY_VOCAB_MASK, apply_vocab_mask, Kind.REPLACE),
        Hook("default KV capacity", compat.APPLY_TOKEN_CONSTRAINTS, limit_tokens, Kind.AFTER),
    )
    if defaults.on_psa_cpu_platform()
    else ()
)
