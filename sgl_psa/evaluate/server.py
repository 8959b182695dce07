"""Asks a running SGLang server over HTTP; each request names its policy.

The server prefills context and question densely and decodes the answer under the policy.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sgl_psa.config import PSAConfig, fields
from sgl_psa.evaluate.example import Example, Query, TextExample
from sgl_psa.evaluate.measurement import Measurement, Progress
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.prompt import Prompt
from sgl_psa.evaluate.tasks import PERPLEXITY, Task

_TIMEOUT_SECONDS = 1800.0


class ServerError(RuntimeError):
    """The server cannot be reached, refuses a request, or does not run PSA."""


class Server:
    """See the module."""

    def __init__(self, url: str, tokenizer: Any, *, name: str, chat: bool, parallel: int) -> None:
        """
        Args:
            tokenizer: of the served model; it decides how long contexts are.
            parallel: requests under way at the same time.
        """
        self.url = url.rstrip("/")
        self.prompt = Prompt(tokenizer, chat)
        self.parallel = parallel
        self.config = server_config(self.url)
        self.identity = {"model": name, "fingerprint": "", "runner": "server"}

    def refuses(self, task: Task, spec: PolicySpec) -> str | None:
        if task.metric == PERPLEXITY:
            return "a server cannot be fed a text token by token: measure it in process"
        asked, own = spec.server_settings(), PolicySpec("", self.config, None, None)
        other = {k: v for k, v in own.server_settings().items() if asked[k] != v}
        if other and spec.policy != "dense":
            flags = " ".join(f"--psa-{k.replace('_', '-')} {asked[k]}" for k in other)
            return f"the server must be started with {flags}"
        if spec.stop == "change" and self.config.stop != "change":
            return "the server must be started with --psa-stop change"
        return None

    def measure(
        self,
        examples: Sequence[Example | TextExample],
        specs: Sequence[PolicySpec],
        progress: Progress,
    ) -> list[Measurement]:
        results = []
        with ThreadPoolExecutor(self.parallel) as pool:
            for spec in specs:
                result = Measurement()
                params = spec.request()
                work = [
                    pool.submit(self._ask, example, query, params)
                    for example in examples
                    if isinstance(example, Example)
                    for query in example.queries
                ]
                for future in work:
                    grades, reads = future.result()
                    result.grades += grades
                    result.queries += len(grades)
                    for sums in reads:
                        result.reads.add(**sums)
                    progress(len(grades))
                results.append(result)
        return results

    def _ask(
        self, example: Example, query: Query, params: dict[str, Any]
    ) -> tuple[list[float], list[dict[str, float]]]:
        grades, reads, ids = list[float](), [], self.prompt.context_ids(example)
        for i, turn in enumerate(query.turns):
            ids += self.prompt.turn_ids(turn, first=i == 0)
            sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": turn.max_tokens}
            if turn.stop:
                sampling["stop"] = turn.stop
            body = {"input_ids": ids, "sampling_params": {**sampling, "custom_params": params}}
            answer = post(f"{self.url}/generate", body)
            output = answer["text"]
            grades.append(turn.grade(output))
            ids += self.prompt.encode(output.split(turn.stop)[0] if turn.stop else output)
            psa = answer["meta_info"]["psa"]
            if psa["decode_steps"]:
                reads.append(_sums(psa))
        return grades, reads


def _sums(psa: dict[str, Any]) -> dict[str, float]:
    """``meta_info["psa"]`` as sums; its means weigh as many visits as there were steps."""
    steps = psa["decode_steps"]
    coverage = psa["coverage"]
    return {
        **{k: psa[k] for k in ("bytes_read", "bytes_dense", "pages_attended", "pages_total")},
        "visits": steps,
        "rounds": psa["rounds"] * steps,
        "coverage": 0.0 if coverage is None else coverage * steps,
        "estimates": 0 if coverage is None else steps,
    }


def server_config(url: str) -> PSAConfig:
    """The settings that the server runs with.

    Raises:
        ServerError: it cannot be reached, or does not run PSA.
    """
    config = get(f"{url}/psa/stats")["config"]
    return PSAConfig(**{f.name: config[f.name] for f in fields() if f.name in config})


def model_path(url: str) -> str:
    """What the server calls its model."""
    return get(f"{url.rstrip('/')}/model_info")["model_path"]


def get(url: str) -> Any:
    """JSON of a GET request."""
    return _open(urllib.request.Request(url))


def post(url: str, body: dict[str, Any]) -> Any:
    """JSON of a POST request."""
    data = json.dumps(body).encode()
    return _open(urllib.request.Request(url, data, {"Content-Type": "application/json"}))


def _open(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:500]
        if error.code == 404 and request.full_url.endswith("/psa/stats"):
            detail = "this server does not run PSA: start it with --attention-backend psa"
        raise ServerError(f"{request.full_url}: HTTP {error.code}: {detail}") from None
    except urllib.error.URLError as error:
        raise ServerError(f"{request.full_url}: {error.reason}: is the server running?") from None
