"""vLLM's CPU build, engine and model in this process, compiled as it is by default."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmark.serving.worker import Generate, Progress, serve

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


def start(settings: dict[str, Any]) -> tuple[Generate, Callable[[], None], str]:
    """An engine without prefix cache whose prompts are prefilled in one piece."""
    gib = -(-settings["kv_bytes"] // 2**30)
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=str(gib))
    import vllm

    longest = settings["longest"]
    model = vllm.LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=max(longest, 8192),
        max_num_seqs=8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    engine = model.llm_engine
    numbers = itertools.count()

    def generate(prompts: list[list[int]], new_tokens: int) -> Iterator[Progress]:
        params = vllm.SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        for ids in prompts:
            engine.add_request(str(next(numbers)), {"prompt_token_ids": ids}, params)
        seen: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = len(output.outputs[0].token_ids)
            yield Progress(min(seen.values()) if len(seen) == len(prompts) else 0, {})

    return generate, lambda: None, vllm.__version__


if __name__ == "__main__":
    serve(start)
