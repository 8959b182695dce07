"""The plain style on a tiny random model whose tokenizer has a chat template."""

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sgl_psa.evaluate import cli
from sgl_psa.evaluate.example import Example, Query, Turn
from sgl_psa.evaluate.feeder import Answering
from sgl_psa.evaluate.paged_model import PagedModel
from sgl_psa.evaluate.prompt import Prompt

#: As those of instruct models: a first token, a system message of its own, trimmed contents.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}[system] Be brief.\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
LENGTH = 1200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chat_model")
    tokenizer = AutoTokenizer.from_pretrained(cli.EMBEDDED)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


def fed(folder, out, monkeypatch, *extra: str) -> tuple[list[int], list[str]]:
    """Token ids of the first prompt as the model is fed them, and the styles of the rows."""
    contexts, questions = [], []
    prefill, decode = PagedModel.prefill, PagedModel.decode

    def spy_prefill(self, ids):
        contexts.append(list(ids))
        return prefill(self, ids)

    def spy_decode(self, group, rows):
        feeders = [row.feeder for row in rows]
        assert all(isinstance(feeder, Answering) for feeder in feeders)
        questions.extend(list(feeder._pending) for feeder in feeders)
        return decode(self, group, rows)

    monkeypatch.setattr(PagedModel, "prefill", spy_prefill)
    monkeypatch.setattr(PagedModel, "decode", spy_decode)
    arguments = ["--model", str(folder), "--lengths", str(LENGTH), "--queries", "1"]
    arguments += ["--tasks", "single", "--policies", "psa:marginal:0.1", "--out", str(out)]
    assert cli.main([*arguments, *extra]) == 0
    assert len({tuple(question) for question in questions}) == 1
    rows = json.loads((out / "eval.json").read_text())
    assert len(rows) == 2 and all(0 < row["bytes_fraction"] <= 1 for row in rows)
    return contexts[0] + questions[0], [row["style"] for row in rows]


def test_prompts_go_through_the_template_once(folder, tmp_path, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, styles = fed(folder, tmp_path, monkeypatch)
    assert styles == ["plain", "plain"] and len(ids) <= LENGTH
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(ids)
    (_, content) = text.split("[user] ")
    content, answer = content.split("\n[assistant] ")
    assert answer.startswith("The secret number of ") and answer.endswith(" is")
    message = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == rendered + answer and text.count("[system] Be brief.") == 1


def test_no_chat_leaves_the_template_out(folder, tmp_path, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, _ = fed(folder, tmp_path, monkeypatch, "--no-chat")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(ids)
    assert "[user]" not in text and "[system]" not in text
    assert "? The secret number of " in text and text.endswith(" is")


def test_a_template_that_rewrites_messages_is_refused(folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="--no-chat"):
        Prompt(tokenizer, chat=True)


def test_later_turns_of_a_chat_are_a_new_message(folder) -> None:
    """No task asks a second question in a chat; a prompt that would is refused, not made up."""
    prompt = Prompt(AutoTokenizer.from_pretrained(folder), chat=True)
    turn = Turn("Why?", ("because",), 3)
    example = Example("Text. ", (Query((turn, turn)),))
    assert prompt.context(example) + prompt.turn(turn) == (
        "<|bos|>[system] Be brief.\n[user] Text. Why?\n[assistant] "
    )
    with pytest.raises(ValueError, match="one turn"):
        prompt.turn(turn, first=False)
