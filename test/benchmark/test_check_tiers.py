"""The check of tiers on a GPU without one: its prompts, its verdict, the flags of its servers."""

from typing import ClassVar

import pytest

from benchmark.gpu import check_tiers
from benchmark.memory.systems import RESIDENT


class Answers:
    """A server that repeats what it is told, and says how it was started."""

    started: ClassVar[list[list[str]]] = []
    wrong: int | None = None
    problems: ClassVar[list[str]] = []

    def __init__(self, name, arguments, log):
        self.started.append(arguments)
        self.tiered = "--psa-device-pool-bytes" in arguments

    def generate(self, ids, max_new_tokens, **_):
        ids = [*ids[:max_new_tokens]]
        if self.wrong is not None and self.tiered:
            ids[self.wrong] += len(self.started)  # No two are wrong in the same way.
        return {"output_ids": ids, "meta_info": {}}

    def together(self, prompts, **sampling):
        return [self.generate(ids, **sampling) for ids in prompts]

    def stats(self):
        return {"memory": {"loads": 3} if self.tiered else None}

    def memory_problems(self):
        return self.problems

    def stop(self):
        pass

    assert_no_leak = stop


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 0, "3 loads, equal, ok"),
        ({"wrong": 40}, 1, "answer 0 differs from token 40 of 48 on"),
        ({"problems": ["frame 3: no owner"]}, 1, "frame 3: no owner"),
    ],
)
def test_servers_are_compared(monkeypatch, tmp_path, capsys, changes, status, said) -> None:
    for name, value in {"started": [], **changes}.items():
        monkeypatch.setattr(Answers, name, value)
    monkeypatch.setattr(check_tiers, "Server", Answers)
    monkeypatch.setattr("sys.argv", ["check", "--tokens", "600", "--logs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        check_tiers.main()
    assert ended.value.code == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tiers {RESIDENT.name:16} ok"
    # The first server over an int8 host is what the second is compared with.
    assert all(said in lines[at] for at in (1, 2, 4)) and "equal" not in lines[3]
    assert ("int8" in lines[3]) and ("ok" in lines[3]) == ("problems" not in changes)
    assert len(Answers.started) == 5
    assert [("--psa-host-dtype" in given) for given in Answers.started] == [False] * 3 + [True] * 2
    for given in Answers.started:
        flags = dict(zip(given[::2], given[1::2], strict=True))
        assert flags["--psa-backend"] == "triton" and flags["--device"] == "cuda"
        assert flags["--psa-min-context"] == "0" and "--psa-host-path" not in flags
        assert flags["--cuda-graph-backend-decode"] == "disabled"


def test_prompts_share_prefixes_and_take_several_chunks() -> None:
    made = check_tiers.prompts(1000, 6000)
    assert made == check_tiers.prompts(1000, 6000) != check_tiers.prompts(1000, 6000, 2)
    assert made[0][:3000] == made[1][:3000] and made[0][:8] != made[2][:8]
    assert all(5000 < len(ids) <= 6000 for ids in made) and made[0] != made[1]
