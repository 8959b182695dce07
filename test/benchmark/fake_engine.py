"""An engine that answers at once; started like a real one by the serving benchmark's tests."""

import os

from benchmark.serving.worker import Progress, serve


def start(settings):
    arguments = settings["arguments"]
    if arguments.get("broken") == "start":
        raise RuntimeError("no such engine")

    def generate(prompts, new_tokens):
        if arguments.get("broken") == "answer" and len(prompts[0]) > 200:
            raise ValueError("too long")
        for tokens in range(1, new_tokens + 1):
            yield Progress(tokens, arguments.get("meta", {}))

    return generate, lambda: None, f"{len(settings)} {os.environ['OMP_NUM_THREADS']}"


if __name__ == "__main__":
    serve(start)
