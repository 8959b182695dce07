"""Requests that take turns, because the arena holds two working sets: answers, aborts, books.

The working sets are made up (``fake_tier``), so that what fits does not hang on the model.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import assert_same, tokens
from test.server.conftest import CHUNK, COMMON, PSA, flags, running
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

FAKE = Path(__file__).with_name("fake_tier")
SHARE, PAGES, LAYERS = 0.5, 50, 5
#: Two requests of 50 pages fit, a third one does not; five are admitted at most.
FRAMES = int(2.3 * SHARE * PAGES * LAYERS / 0.9 / 0.9)
NEW = 80


@pytest.fixture(scope="module")
def crowded(model: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "fake_tier.py").symlink_to(FAKE / "fake_tier.py")
    about = folder / "fake_tier-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fake_tier\nVersion: 0.0.1\n")
    (about / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nfake_tier = fake_tier:register\n"
    )
    env = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "FAKE_TIER": f"{FRAMES},{SHARE}",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    options = flags(
        model_path=model,
        max_total_tokens=16384,
        chunked_prefill_size=CHUNK,
        **{**COMMON, **PSA, "context_length": 2048},
    )
    with running(Server("crowded", options, logs / "crowded.log", env)) as process:
        yield process


def admission(server: Server) -> dict[str, int]:
    found: dict[str, int] = server.stats()["ranks"][0]["admission"]
    return found


def wait_paused(server: Server) -> dict[str, int]:
    """Wait until a request pauses."""
    end = time.monotonic() + 60
    while not (found := admission(server))["paused"]:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def ask(prompts: Prompts, count: int, seed: int) -> list[list[int]]:
    return [prompts.recall(700, seed=seed + 10 * n).ids for n in range(count)]


def test_six_requests_take_turns_and_answer_as_if_alone(crowded: Server, prompts: Prompts) -> None:
    asked = ask(prompts, 6, 7000)
    alone = [crowded.generate(ids, max_new_tokens=NEW, ignore_eos=True) for ids in asked]
    assert admission(crowded)["pauses"] == 0
    crowded.flush()
    got = crowded.together(asked, max_new_tokens=NEW, ignore_eos=True)
    after = admission(crowded)
    assert after["pauses"] >= 4
    assert after["held_back"] >= 1, "all six were admitted at once"
    assert_same(got, alone)
    crowded.assert_no_leak()


def test_penalties_follow_a_request_through_its_pauses(crowded: Server, prompts: Prompts) -> None:
    """Under a high penalty answers do not repeat themselves."""
    asked = ask(prompts, 4, 7200)
    before = admission(crowded)["pauses"]
    answers = crowded.together(
        asked, max_new_tokens=NEW, ignore_eos=True, frequency_penalty=2.0, min_new_tokens=NEW
    )
    assert admission(crowded)["pauses"] > before
    for given in tokens(answers):
        assert len(given) == NEW
        assert len(set(given)) > NEW // 2
    crowded.assert_no_leak()


def test_abort_of_a_request_that_pauses(crowded: Server, prompts: Prompts) -> None:
    """All are aborted; those that pause end at once too, and nothing of them remains."""
    asked = ask(prompts, 4, 7400)
    answers: list[dict] = []
    clients = [
        threading.Thread(
            target=lambda ids=ids: answers.append(
                crowded.generate(ids, max_new_tokens=1000, ignore_eos=True)
            )
        )
        for ids in asked
    ]
    for client in clients:
        client.start()
    wait_paused(crowded)
    flushed = crowded.post("/flush_cache", "")
    assert flushed.status_code == 400, "a flush while requests pause"
    assert crowded.post("/abort_request", {"abort_all": True}).status_code == 200
    for client in clients:
        client.join(60)
    reasons = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert reasons == ["abort"] * 4
    crowded.assert_no_leak()


def test_clients_that_go_away_while_their_requests_pause(crowded: Server, prompts: Prompts) -> None:
    """And the generation is paused and resumed, with all requests retracted, over it."""
    asked = ask(prompts, 4, 7600)
    alone = crowded.generate(asked[3], max_new_tokens=20)
    crowded.flush()
    streams = [crowded.stream(ids, max_new_tokens=1000, ignore_eos=True) for ids in asked]
    for events in streams:
        next(events)
    wait_paused(crowded)
    for events in streams[1:]:
        events.close()
    crowded.post("/pause_generation", {"mode": "retract"})
    crowded.post("/continue_generation", {})
    got = crowded.generate(asked[3], max_new_tokens=20)
    streams[0].close()
    assert tokens([got]) == tokens([alone])
    crowded.assert_no_leak()
