"""Values for what the user did not set, so that a plain command starts. What is given stays."""

from __future__ import annotations

import os
from typing import Any

from sgl_psa.config import ConfigError
from sglang_psa import graph_args

#: Tokens a page under the psa backend.
PAGE_SIZE = 16
#: Share of memory for weights and KV on a machine whose RAM the server shares with others.
CPU_MEM_FRACTION = 0.7
OMP_BIND = "SGLANG_CPU_OMP_THREADS_BIND"
CORE_DUMP = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
#: 1 keeps SGLang's overlap scheduler on CPUs.
CPU_OVERLAP = "SGL_PSA_CPU_OVERLAP"


def apply_psa_defaults(server_args: Any) -> None:
    """Page size and graph switches for a server that decodes with psa."""
    if server_args.page_size is None:
        server_args.page_size = PAGE_SIZE
    graphs_chosen = (
        server_args.cuda_graph_config is not None
        or server_args.cuda_graph_backend_decode is not None
    )
    if not graphs_chosen and not graph_args.possible(server_args):
        server_args.disable_decode_cuda_graph = True
    prefill = server_args.prefill_attention_backend or server_args.attention_backend
    if prefill == "psa" and server_args.cuda_graph_backend_prefill is None:
        server_args.disable_prefill_cuda_graph = True
    if on_psa_cpu_platform():
        # An idle scheduler otherwise polls, and takes a core from whoever computes.
        server_args.sleep_on_idle = True
        if not _overlap_wanted():
            server_args.disable_overlap_schedule = True


def apply_cpu_defaults(server_args: Any) -> None:
    """What SGLang needs to be told on a machine without an accelerator."""
    if not on_psa_cpu_platform() or server_args.device not in (None, "cpu"):
        return
    server_args.device = "cpu"
    if server_args.attention_backend is None:
        server_args.attention_backend = "torch_native"
    if server_args.mem_fraction_static is None:
        server_args.mem_fraction_static = CPU_MEM_FRACTION
    # When one rank fails, SGLang gives the others a minute to dump the state of their GPUs.
    os.environ.setdefault(CORE_DUMP, "0")
    _bind_threads(server_args.tp_size)


def on_psa_cpu_platform() -> bool:
    """Whether SGLang runs on this package's CPU platform."""
    from sglang_psa.compat import current_platform
    from sglang_psa.cpu_platform import PSACpuPlatform

    return isinstance(current_platform, PSACpuPlatform)


def _overlap_wanted() -> bool:
    """Whether the scheduler prepares a step while another runs. On a CPU the same core does both,
    so nothing is gained, and every token comes a step later.

    Raises:
        ConfigError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(CPU_OVERLAP, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{CPU_OVERLAP} must be 0 or 1, got {value!r}")
    return value == "1"


_our_binding: str | None = None


def _bind_threads(tp_size: int) -> None:
    """Share the cores among tensor-parallel ranks; SGLang by itself asks for a node a rank.

    The variable outlives an engine, so a binding of ours is taken back for the next one.
    """
    global _our_binding
    if os.environ.get(OMP_BIND) == _our_binding:
        os.environ.pop(OMP_BIND, None)
    if tp_size <= 1 or OMP_BIND in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // tp_size)
    ranks = [cores[i * share % len(cores) :][:share] for i in range(tp_size)]
    _our_binding = "|".join(",".join(map(str, r)) for r in ranks)
    os.environ[OMP_BIND] = _our_binding
