"""A real ``sgl.Engine``: scheduler and detokenizer are processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmark.serving.worker import Generate, Progress, serve


def start(settings: dict[str, Any]) -> tuple[Generate, Callable[[], None], str]:
    """An engine without prefix cache whose prompts are prefilled in one piece: torch_native would
    otherwise compute the prefix of every chunk anew."""
    import sglang

    engine = sglang.Engine(
        model_path=settings["model"],
        device="cpu",
        dtype="bfloat16",
        page_size=16,
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        chunked_prefill_size=-1,
        max_total_tokens=settings["tokens"],
        max_running_requests=8,
        mem_fraction_static=0.5,
        stream_interval=1,
        sleep_on_idle=True,
        watchdog_timeout=7200,  # A long prompt in one piece takes a slow CPU many minutes.
        log_level="error",
        **settings["arguments"],
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> Iterator[Progress]:
        params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        seen = [0] * len(prompts)
        for chunk in engine.generate(input_ids=prompts, sampling_params=params, stream=True):
            meta = chunk["meta_info"]
            seen[chunk.get("index", 0)] = meta["completion_tokens"]
            yield Progress(min(seen), meta.get("psa") or {})

    return generate, engine.shutdown, sglang.__version__


if __name__ == "__main__":
    serve(start)
