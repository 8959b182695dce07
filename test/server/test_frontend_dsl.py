"""A program of SGLang's frontend language on a psa server."""

import pytest

from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server


def test_fork_gen_select_on_a_shared_prefix(server: Server, prompts: Prompts) -> None:
    import sglang

    context, values = prompts.context(900, seed=3000)
    text = prompts.text(context)
    keys = list(values)[:3]

    @sglang.function
    def program(s, document):  # type: ignore[no-untyped-def]
        s += document
        branches = s.fork(len(keys))
        for branch, key in zip(branches, keys, strict=True):
            branch += f"\n? {key}:" + sglang.gen("value", max_tokens=6, temperature=0)
        branches.join()
        for key, branch in zip(keys, branches, strict=True):
            s += f"\n# {key}:" + branch["value"]
        s += "\n# kind:" + sglang.select("kind", [" text", " picture"])
        s += "\n" + sglang.gen("end", max_tokens=6, temperature=0)
        s.set_var("values", [branch["value"] for branch in branches])

    before = server.stats()
    server.flush()
    state = program.run(document=text, backend=sglang.RuntimeEndpoint(server.url))
    assert state["kind"] in (" text", " picture")
    assert isinstance(state["end"], str)
    alone = [
        server.generate(f"{text}\n? {key}:", max_new_tokens=6, skip_special_tokens=True)["text"]
        for key in keys
    ]
    assert state["values"] == alone
    after = server.stats()
    assert after["sparse_rows"] - before["sparse_rows"] >= 4 * 5
