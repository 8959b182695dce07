"""Accuracy and bytes read of a running server, policy by policy, on recall tasks.

    make serve                                  # in another terminal
    python -m benchmark.recall_server --lengths 4096,8192

Contexts are ordinary English (the topics of Python's own help) with the set lines of the embedded
model's recall language in it; keys are one or two words taken from that text. The same prompts go
to every policy as per-request settings, dense included. Exact match counts whole answers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import random
import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pydoc_data import topics
from typing import Any

from benchmark.common import save

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"psa_policy": "dense"},
    "marginal 0.3": {"psa_delta": 0.3},
    "marginal 0.1": {"psa_delta": 0.1},
    "marginal 0.03": {"psa_delta": 0.03},
    "coverage 0.9": {"psa_coverage": 0.9},
    "coverage 0.99": {"psa_coverage": 0.99},
}
TEXT = re.sub(r"[^\x20-\x7e\n]", "", "\n".join(topics.topics[k] for k in sorted(topics.topics)))
WORDS = sorted({w for w in re.findall(r"\b[a-z]{4,9}\b", TEXT)})
#: Characters a token, by task: needles tokenise worse than text.
CHARS_PER_TOKEN = {"single": 3.0, "multi_key": 2.65, "all_needle": 2.65, "tracking": 3.0}


@dataclass
class Context:
    """Set lines, the queries about them (question, answer), and how much text lies between."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)
    queries: list[tuple[str, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def key(self) -> str:
        """A fresh key of one or two words; no key is the beginning of another."""
        while True:
            words = self.rng.sample(WORDS, self.rng.choice((1, 2, 2)))
            first = words[0]
            if first not in self.used:
                self.used.add(first)
                return " ".join(words)

    def number(self) -> str:
        return f"{self.rng.randrange(10**6):06d}"

    def put(self) -> None:
        """One key with a number."""
        key, value = self.key(), self.number()
        self.lines.append(f"# {key}{value}")
        self.queries.append((f"? {key}", value))


def single(context: Context, chars: int) -> None:
    """One needle."""
    context.put()


def multi_key(context: Context, chars: int) -> None:
    """Four tenths of the context are needles."""
    while sum(map(len, context.lines)) < 0.4 * chars:
        context.put()


def all_needle(context: Context, chars: int) -> None:
    """Nothing but needles."""
    while sum(map(len, context.lines)) < 0.95 * chars:
        context.put()


def tracking(context: Context, chars: int) -> None:
    """Chains of two or three keys; the answer spells the way and the number at its end."""
    queries = []
    while sum(map(len, context.lines)) < 0.15 * chars:
        keys = [context.key() for _ in range(context.rng.choice((2, 3)))]
        value = context.number()
        context.lines.append(f"# {keys[-1]}{value}")
        context.lines += [f"# {a} {b}" for a, b in itertools.pairwise(keys)][::-1]
        queries.append((f"> {keys[0]}", f" {' '.join(keys[1:])}{value}"))
    context.queries = queries


TASKS: dict[str, Callable[[Context, int], None]] = {
    "single": single,
    "multi_key": multi_key,
    "all_needle": all_needle,
    "tracking": tracking,
}


def build(task: str, tokens: int, seed: int) -> tuple[str, list[tuple[str, str]]]:
    """A context of about ``tokens`` tokens and its queries."""
    context = Context(random.Random(f"{task}/{tokens}/{seed}"))
    chars = int(tokens * CHARS_PER_TOKEN[task])
    TASKS[task](context, chars)
    filler = chars - sum(len(line) + 1 for line in context.lines)
    start = context.rng.randrange(max(1, len(TEXT) - max(filler, 0)))
    text = TEXT[start : start + max(filler, 0)]
    breaks = [match.start() for match in re.finditer("\n", text)] or [0]
    cuts = sorted(context.rng.choice(breaks) for _ in context.lines)
    pieces, done = [], 0
    for cut, line in zip(cuts, context.lines, strict=True):
        pieces.append(text[done:cut].strip("\n"))
        pieces.append(line)
        done = cut
    pieces.append(text[done:].strip("\n"))
    return "\n".join(p for p in pieces if p) + "\n", context.queries


def ask(url: str, prompt: str, answer: str, params: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether the greedy continuation begins with ``answer``, and the psa statistics."""
    body = {
        "text": prompt,
        "sampling_params": {"max_new_tokens": 24, "temperature": 0, "stop": "\n", **params},
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        result = json.load(response)
    return result["text"].strip() == answer.strip(), result["meta_info"]["psa"]


def run(url: str, task: str, tokens: int, queries: int, per_context: int, policy: str) -> dict:
    """Exact match and mean fractions over ``queries`` queries."""
    work = []
    seed = 0
    while len(work) < queries:
        text, pairs = build(task, tokens, seed)
        random.Random(seed).shuffle(pairs)
        work += [(text + question, answer) for question, answer in pairs[:per_context]]
        seed += 1
    work = work[:queries]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda item: ask(url, item[0], item[1], POLICIES[policy]), work))
    counted = [psa for _, psa in results if psa["decode_steps"]]
    mean = {
        name: sum(psa[name] for psa in counted) / max(1, len(counted))
        for name in ("bytes_fraction", "pages_fraction", "coverage", "rounds")
    }
    right = sum(ok for ok, _ in results)
    return {
        "task": task,
        "tokens": tokens,
        "policy": policy,
        "queries": queries,
        "exact_match": right / queries,
        **mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--per-context", type=int, default=10)
    options = parser.parse_args()
    results = []
    for tokens in map(int, options.lengths.split(",")):
        for task in options.tasks.split(","):
            for policy in options.policies.split(","):
                row = run(options.url, task, tokens, options.queries, options.per_context, policy)
                results.append(row)
                print(
                    f"{tokens:6d} {task:11s} {policy:13s} exact {row['exact_match']:.3f} "
                    f"bytes {row['bytes_fraction']:.3f} pages {row['pages_fraction']:.3f}",
                    flush=True,
                )
    print(save("recall_server", {"options": vars(options), "results": results}))


if __name__ == "__main__":
    main()
