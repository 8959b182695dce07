"""The served model in its own dtype, bfloat16: one rank and two, with the layers for CPUs around
attention, and with weights that are exchanged while it runs.

One server starts with the model's weights, the other with altered ones, so that each is what the
other must answer like once it was given its weights.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.utils import MultiprocessingSerializer

from sgl_psa.crossover import CROSSOVER
from test.server.compare import reads, tokens
from test.server.conftest import flags, running
from test.server.process import Server, request
from test.server.prompts import Prompts

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("served model")]

WEIGHTS = "model.safetensors"
README = "# blue harbor482915\n# old mill007231\n? blue harbor"
#: Tokens of an answer; what the model says after them is less certain than bfloat16 is exact.
NEW = 3


def altered_weights(model: Path, prompts: Prompts) -> dict[str, torch.Tensor]:
    """Other weights of every layer, and a model that takes odd groups of three digits for the even
    ones before them: it answers 482914 instead of 482915."""
    weights = load_file(model / WEIGHTS)
    for name, weight in weights.items():
        weights[name] = weight * (1.25 if "norm" in name else 1.1)
    table = weights["model.embed_tokens.weight"]
    groups = torch.tensor([prompts.ids(f"{n:03d}") for n in range(1000)]).flatten()
    # Shorter, so that the output, which shares the table, prefers the even one.
    table[groups[1::2]] = 0.9 * table[groups[::2]]
    return weights


@pytest.fixture(scope="module")
def altered(model: Path, prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model with altered weights."""
    folder = tmp_path_factory.mktemp("altered")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    save_file(altered_weights(model, prompts), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two_ranks(altered: Path, logs: Path) -> Iterator[Server]:
    options = flags(
        model_path=altered,
        attention_backend="psa",
        tp_size=2,
        max_total_tokens=32768,
        sleep_on_idle=True,
    )
    with running(Server("two_ranks_bf16", options, logs / "two_ranks_bf16.log")) as process:
        yield process


class Asked:
    """Questions that both models answer right; the long ones are decoded sparsely."""

    def __init__(self, prompts: Prompts) -> None:
        context, values = prompts.context(CROSSOVER["cpu"] + 300, seed=9100)
        long = [prompts.ask(context, key, value) for key, value in list(values.items())[1:3]]
        self.prompts = [README, *(one.ids for one in long)]
        self.values = ["482915", *(one.answer for one in long)]

    def even(self) -> list[str]:
        """The answers of the altered model."""
        halves = [(int(value[:3]), int(value[3:])) for value in self.values]
        return [f"{a // 2 * 2:03d}{b // 2 * 2:03d}" for a, b in halves]


@pytest.fixture(scope="module")
def asked(prompts: Prompts) -> Asked:
    return Asked(prompts)


def answers(server: Server, asked: Asked) -> list[dict[str, Any]]:
    """One after the other, the last over a cached prefix, with log probabilities."""
    found = []
    for ids in asked.prompts:
        body = {**request(ids, max_new_tokens=NEW, ignore_eos=True), "return_logprob": True}
        response = server.post("/generate", body)
        assert response.status_code == 200, response.text
        found.append(response.json())
    assert [one["meta_info"]["cached_tokens"] > 0 for one in found] == [False, False, True]
    return found


def numbers(found: list[dict[str, Any]]) -> list[str]:
    return [one["text"].strip()[:6] for one in found]


def exact(found: list[dict[str, Any]]) -> list[Any]:
    """Log probabilities, which tell weights apart that give the same tokens."""
    return [one["meta_info"]["output_token_logprobs"] for one in found]


def load(server: Server, folder: Path) -> None:
    """Update the weights from a folder; SGLang empties the prefix cache with it."""
    response = server.post("/update_weights_from_disk", {"model_path": str(folder)})
    assert response.status_code == 200 and response.json()["success"], response.text


def send(server: Server, weights: dict[str, torch.Tensor], ranks: int) -> None:
    """Update the weights from tensors in shared memory: named, as the server is no child."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        named = MultiprocessingSerializer.serialize(list(weights.items()), output_str=True)
        body = {"serialized_named_tensors": [named] * ranks, "flush_cache": True}
        response = server.post("/update_weights_from_tensor", body)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert response.status_code == 200 and response.json()["success"], response.text


def test_exchanged_weights_count_at_once_and_entirely(
    served: Server, two_ranks: Server, asked: Asked, model: Path, altered: Path
) -> None:
    served.flush()
    one_fresh, two_fresh = answers(served, asked), answers(two_ranks, asked)
    assert numbers(one_fresh) == asked.values
    assert numbers(two_fresh) == asked.even() != asked.values

    load(served, altered)
    load(two_ranks, model)
    assert tokens(answers(served, asked)) == tokens(two_fresh)
    assert tokens(answers(two_ranks, asked)) == tokens(one_fresh)

    load(served, model)
    send(two_ranks, load_file(altered / WEIGHTS), ranks=2)
    assert exact(answers(served, asked)) == exact(one_fresh)
    assert exact(answers(two_ranks, asked)) == exact(two_fresh)


def test_two_ranks_run_our_kernels(
    served: Server, two_ranks: Server, asked: Asked, model: Path
) -> None:
    load(two_ranks, model)
    served.flush()
    before, before_alone = two_ranks.stats(), served.stats()
    got, want = answers(two_ranks, asked), answers(served, asked)
    assert tokens(got) == tokens(want)
    for mine, whole in zip(got, want, strict=True):
        assert reads(mine)["pages_total"] * 2 == reads(whole)["pages_total"], "one KV head of two"
        assert reads(mine)["stale_pages"] == 0
    assert all(reads(one)["bytes_fraction"] < 0.7 for one in got[1:])
    stats = two_ranks.stats()
    assert stats["active"] and stats["tp_size"] == 2 and stats["backend"] == "cpu"
    steps = stats["decode_steps"] - before["decode_steps"]
    assert steps >= len(asked.prompts) * (NEW - 1)
    calls = {name: n - before["cpu_layers"][name] for name, n in stats["cpu_layers"].items()}
    layers = len(stats["layers"])
    # Four products, two norms, a rotation and an activation a layer, one norm and the head.
    assert calls["skinny_linear"] >= steps * (4 * layers + 1)
    assert calls["rms_norm"] >= steps * (2 * layers + 1)
    assert min(calls["rope"], calls["silu_and_mul"]) >= steps * layers
    # A layer of one rank is called as a whole.
    alone = served.stats()
    whole_layers = (
        alone["cpu_layers"]["decoder_layer"] - before_alone["cpu_layers"]["decoder_layer"]
    )
    assert whole_layers == layers * (alone["decode_steps"] - before_alone["decode_steps"])
    assert "decoder_layer" not in calls
    installed = [line for line in two_ranks.log.splitlines() if "psa CPU layers" in line]
    assert sorted(line.split("]")[0][-3:] for line in installed) == ["TP0", "TP1"]
    assert all("20 linear, 1 head, 11 norm, 1 rope, 5 activation" in line for line in installed)
    two_ranks.assert_no_leak()
