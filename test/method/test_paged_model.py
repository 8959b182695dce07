"""Page sizes, heads that select apart, and the split of bytes read."""

import pytest
import torch
from sgl_psa_kernels._native import native_available

from sgl_psa.evaluate import cli, policy_spec
from sgl_psa.evaluate.arena import Arena
from sgl_psa.evaluate.feeder import Forced
from sgl_psa.evaluate.in_process import InProcess, load_model
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.measurement import Measurement, Reads
from sgl_psa.evaluate.paged_model import PagedModel, Row
from sgl_psa.evaluate.tasks import TASKS
from sgl_psa.memory.placements import PLACEMENTS

AVAILABLE, REASON = native_available()
LENGTH = 1300
ARENA_LENGTH = 3400
GROUP = 2  # query heads of a KV head of the embedded model
HEAD_DIM = 128
SPANS = [(700, 720), (1001, 1033), (1100, 1101)]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(cli.EMBEDDED), "float32", "cpu")


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{"page_size": 8}, {"page_size": 64}, {"share_heads": False}])
def test_dense_is_the_model_itself(loaded, settings) -> None:
    """Spans that begin in the middle of pages have the losses of one full forward pass."""
    model, tokenizer = loaded
    example = TASKS["text"].build(Material(tokenizer, RECALL), LENGTH, "loss")
    model.set_attn_implementation("sdpa")
    logits = torch.log_softmax(model(torch.tensor([example.ids])).logits[0].float(), -1)
    spec = policy_spec.parse("dense")
    paged = PagedModel(
        model, [spec.config], max_context=LENGTH, max_rows=3, max_tail=32, **settings
    )
    paged.prefill(example.ids)
    rows = [Row(Forced(example.ids[a:b], example.ids[a - 1]), spec.rule(), a - 1) for a, b in SPANS]
    paged.decode(paged.groups[0], rows)
    for row, (start, stop) in zip(rows, SPANS, strict=True):
        exact = [-logits[i - 1, example.ids[i]].item() for i in range(start, stop)]
        assert row.feeder.losses == pytest.approx(exact, abs=2e-4)


def measured(loaded, specs: list[str], **settings) -> list[Measurement]:
    model, tokenizer = loaded
    runner = InProcess(
        model, tokenizer, name="embedded", folder=cli.EMBEDDED, chat=False, **settings
    )
    example = TASKS["multi_key"].build(Material(tokenizer, RECALL), LENGTH, "heads")
    return runner.measure([example], [policy_spec.parse(s) for s in specs], lambda n: None)


def test_heads_apart_attend_fewer_pages_and_read_more_than_shared_dense(loaded) -> None:
    dense, apart = measured(loaded, ["dense", "psa:marginal:exact:0.1"], share_heads=False)
    (shared,) = measured(loaded, ["psa:marginal:exact:0.1"])
    assert dense.reads.fractions()["bytes_fraction"] == GROUP
    assert dense.reads.fractions()["pages_fraction"] == 1
    assert apart.heads.shape[1] == GROUP * shared.heads.shape[1]
    pages = apart.reads.fractions()["pages_fraction"]
    assert pages < shared.reads.fractions()["pages_fraction"]
    # The open page is always attended and not full.
    assert 0.85 * GROUP * pages < apart.reads.fractions()["bytes_fraction"] < GROUP * pages
    assert apart.reads.bytes_dense == pytest.approx(shared.reads.bytes_dense, rel=0.05)


def test_bytes_are_split_into_scores_and_pages(loaded) -> None:
    exact, sketch = measured(loaded, ["psa:marginal:exact:0.1", "psa:marginal:sketch:0.1"])
    assert exact.reads.fractions()["scored_fraction"] == 0
    found = sketch.reads.fractions()
    key_bytes = HEAD_DIM * 2 // 8 + 2 * 2  # codes and two float16
    # Sink and recent pages are not scored.
    assert found["scored_fraction"] == pytest.approx(key_bytes / (8 * HEAD_DIM), rel=0.05)
    assert found["head_bytes"] == pytest.approx(
        found["bytes_fraction"] * sketch.reads.bytes_dense / sketch.reads.visits, rel=1e-4
    )


def test_a_server_cannot_tell_the_split() -> None:
    reads = Reads(bytes_read=1.0, bytes_dense=2.0, visits=1.0)
    assert reads.fractions()["scored_fraction"] is None
    assert reads.fractions()["head_bytes"] is None


def test_results_tell_models_apart(loaded) -> None:
    model, tokenizer = loaded
    kinds = {
        InProcess(
            model, tokenizer, name="embedded", folder=cli.EMBEDDED, chat=False, **settings
        ).identity["runner"]
        for settings in ({}, {"page_size": 16}, {"page_size": 8}, {"share_heads": False})
    }
    assert len(kinds) == 3 and "in process" in kinds


def decoded(loaded, arena: Arena | None) -> tuple[list, PagedModel]:
    """Greedy answers to questions on one context, in two batches, with what was read for them."""
    model, tokenizer = loaded
    runner = InProcess(model, tokenizer, name="embedded", folder=cli.EMBEDDED, chat=False)
    example = TASKS["multi_key"].build(Material(tokenizer, RECALL), ARENA_LENGTH, "arena")
    spec = policy_spec.parse("psa:marginal:0.05")
    ids = runner.prompt.context_ids(example)
    feeders = [feeder for feeder, _ in runner._feeders(example, len(ids))][:6]
    paged = PagedModel(
        model,
        [spec.config],
        max_context=len(ids),
        max_rows=3,
        max_tail=max(feeder.longest() for feeder in feeders),
        arena=arena,
    )
    paged.prefill(ids)
    rows = [Row(feeder, spec.rule(), len(ids)) for feeder in feeders]
    for batch in (rows[:3], rows[3:]):
        paged.decode(paged.groups[0], batch)
    return [(row.feeder.tokens, row.counts.tolist(), row.heads.tolist()) for row in rows], paged


@pytest.fixture(scope="module")
def resident(loaded) -> list:
    return decoded(loaded, None)[0]


@pytest.mark.skipif(not AVAILABLE, reason=f"C++ kernels cannot be built: {REASON}")
@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fraction", [0.25, 0.1])
def test_an_arena_of_any_size_answers_as_the_whole_pool(
    loaded, resident, fraction: float, placement: str, pipeline: bool
) -> None:
    answers, paged = decoded(loaded, Arena(fraction, placement, pipeline))
    assert answers == resident
    tier = paged.groups[0].tier
    snapshot = tier.snapshot()
    assert snapshot["loads"] > 0 and snapshot["hits"] > 0
    assert pipeline or snapshot["bytes_in_vain"] == 0
    assert tier.check() == []
    tier.close()


@pytest.fixture(scope="module")
def rounded(loaded) -> list:
    answers, paged = decoded(loaded, Arena(1.0, host_dtype="int8"))
    assert paged.groups[0].tier.snapshot()["loads"] == 0
    return answers


@pytest.mark.skipif(not AVAILABLE, reason=f"C++ kernels cannot be built: {REASON}")
@pytest.mark.parametrize(("fraction", "in_file"), [(0.25, False), (0.1, True)])
def test_an_int8_host_answers_alike_from_an_arena_of_any_size(
    loaded, resident, rounded, fraction: float, in_file: bool, tmp_path
) -> None:
    host_path = str(tmp_path) if in_file else ""
    answers, paged = decoded(loaded, Arena(fraction, host_path=host_path, host_dtype="int8"))
    assert answers == rounded
    # It is right as before, but not the same: what was attended shows the rounding.
    assert [tokens for tokens, *_ in answers] == [tokens for tokens, *_ in resident]
    assert answers != resident
    tier = paged.groups[0].tier
    snapshot = tier.snapshot()
    assert snapshot["loads"] > 0 and snapshot["host_dtype"] == "int8"
    assert (
        snapshot["host_bytes"]
        < 0.3 * snapshot["num_pages"] * len(snapshot["frames_by_layer"]) * (snapshot["frame_bytes"])
    )
    assert tier.check() == []
    tier.close()
