"""Contexts: answers stand in them, the seed decides them, and they keep their length."""

import hashlib
import itertools
import re

import pytest
from transformers import AutoTokenizer

from sgl_psa.evaluate import text
from sgl_psa.evaluate.cli import EMBEDDED
from sgl_psa.evaluate.example import Example, TextExample, Turn
from sgl_psa.evaluate.material import PLAIN, RECALL, ContextTooShort, Keys, Material
from sgl_psa.evaluate.measurement import build_examples, questions
from sgl_psa.evaluate.prompt import Prompt
from sgl_psa.evaluate.tasks import TASKS, counting

LENGTH = 1536
CELLS = [(name, style) for name, task in TASKS.items() for style in task.builders]
ASKING = [cell for cell in CELLS if cell[0] != "text"]


@pytest.fixture(scope="module")
def materials() -> dict[str, Material]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return {style: Material(tokenizer, style) for style in (RECALL, PLAIN)}


@pytest.mark.parametrize("name, style", CELLS)
def test_the_seed_decides(materials, name: str, style: str) -> None:
    build = TASKS[name].build
    first = build(materials[style], LENGTH, "a")
    assert build(materials[style], LENGTH, "a") == first
    assert build(materials[style], LENGTH, "b") != first


@pytest.mark.parametrize("length", [1536, 4096])
@pytest.mark.parametrize("name, style", ASKING)
def test_a_prompt_with_its_answer_keeps_the_length(materials, name, style, length: int) -> None:
    material = materials[style]
    example = TASKS[name].build(material, length, "0")
    longest = max(
        material.count("".join(t.question + t.prefix for t in query.turns))
        + sum(turn.max_tokens for turn in query.turns)
        for query in example.queries
    )
    used = 1 + material.count(example.context) + longest
    assert used <= length
    assert material.count(example.context) > 0.6 * length


def recall_lines(context: str) -> dict[str, str]:
    """Key and value of each set line with a number, by where the digits begin."""
    lines = re.findall(r"^# ([a-z ]+?)(\d{6})$", context, re.M)
    assert len({key for key, _ in lines}) == len(lines)
    return dict(lines)


@pytest.mark.parametrize("name", ["single", "multi_key", "all_needle", "long_generation"])
def test_recall_answers_stand_in_their_set_lines(materials, name: str) -> None:
    example = TASKS[name].build(materials[RECALL], LENGTH, "1")
    values = recall_lines(example.context)
    turns = [turn for query in example.queries for turn in query.turns]
    assert len(turns) >= 8
    for turn in turns:
        assert turn.answers == (values[turn.question.removeprefix("? ")],)
        assert turn.grade(turn.answers[0] + "\n# more") == 1.0
        assert turn.grade("000000") == 0.0 or turn.answers == ("000000",)


def test_recall_keys_are_held_out_and_no_beginning_of_another(materials) -> None:
    example = TASKS["all_needle"].build(materials[RECALL], 4096, "2")
    keys = list(recall_lines(example.context))
    assert all(text.word_is_held_out(word) for key in keys for word in key.split())
    pairs = itertools.permutations(keys, 2)
    assert not any(a.split() == b.split()[: len(a.split())] for a, b in pairs)


def test_recall_tracking_follows_the_lines(materials) -> None:
    example = TASKS["tracking"].build(materials[RECALL], 4096, "3")
    rest = [line[2:] for line in example.context.splitlines() if line.startswith("# ")]
    assert len(example.queries) > 2
    for query in example.queries:
        (turn,) = query.turns
        at, answer = turn.question.removeprefix("> "), ""
        while not re.search(r"\d{6}$", at + answer):
            found = [line for line in rest if line.startswith(at) and line != at]
            (line,) = [f for f in found if f[len(at)] == " " or f[len(at)].isdigit()]
            step = line[len(at) :]
            answer, at = answer + step, step.strip()
        assert turn.answers == (answer,)


def test_filler_never_looks_like_a_line_of_the_language(materials) -> None:
    example = TASKS["single"].build(materials[RECALL], LENGTH, "4")
    marked = [line for line in example.context.splitlines() if line.lstrip()[:1] in tuple("#?>")]
    assert len(marked) == len(recall_lines(example.context)) == 8


@pytest.mark.parametrize("name", ["single", "multi_key", "multi_value", "all_needle"])
def test_plain_needles_stand_in_the_context(materials, name: str) -> None:
    example = TASKS[name].build(materials[PLAIN], LENGTH, "5")
    for query in example.queries:
        (turn,) = query.turns
        key = re.search(r"numbers? of (.+)\?$", turn.question)[1]
        found = re.findall(rf"^A secret number of {key} is (\d{{6}})\.$", example.context, re.M)
        assert sorted(found) == sorted(turn.answers)
        assert len(found) == (4 if name == "multi_value" else 1)


def test_plain_tracking_and_lists_follow_from_the_context(materials) -> None:
    example = TASKS["tracking"].build(materials[PLAIN], 4096, "6")
    assigned = dict(re.findall(r"^VAR (\w+) = (.+)$", example.context, re.M))
    for query in example.queries:
        value = re.search(r"the value (\d{6})", query.turns[0].question)[1]
        held = {value}
        for _ in range(6):
            held |= {k for k, v in assigned.items() if v.removeprefix("VAR ") in held}
        assert held - {value} == set(query.turns[0].answers)
    listed = TASKS["long_generation"].build(materials[PLAIN], 4096, "6")
    lines = re.findall(r"^A secret number of (.+) is (\d+)\.$", listed.context, re.M)
    assert listed.queries[0].turns[0].answers == tuple(f"{k}: {v}" for k, v in lines)


@pytest.mark.parametrize("name, most, pattern", [
    ("common_words", 10, r"^\d+\. ([a-z]+)$"),
    ("frequent_words", 3, r"(?<=\.\.\. )([a-z]+)|^([a-z]+)(?= \.\.\. )"),
])  # fmt: skip
def test_counted_words_are_the_most_frequent(materials, name, most: int, pattern: str) -> None:
    example = TASKS[name].build(materials[PLAIN], LENGTH, "7")
    found = re.findall(pattern, example.context, re.M)
    words = [w if isinstance(w, str) else w[0] or w[1] for w in found]
    counts = sorted(((words.count(w), w) for w in set(words)), reverse=True)
    assert {w for _, w in counts[:most]} == set(example.queries[0].turns[0].answers)
    assert counts[most - 1][0] > counts[most][0]


@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
def test_word_lists_have_the_length_at_great_length(materials, name: str) -> None:
    length = 200_000
    example = TASKS[name].build(materials[PLAIN], length, "8")
    assert 0.9 * length < materials[PLAIN].count(example.context) <= length


def test_word_lists_that_run_out_of_words_name_the_longest(materials, monkeypatch) -> None:
    monkeypatch.setattr(counting, "invented_held_out_words", lambda count: ())
    with pytest.raises(ContextTooShort, match="ask for --lengths up to that") as raised:
        TASKS["common_words"].build(materials[PLAIN], 100_000, "9")
    longest = int(re.search(r"no more than (\d+) tokens", str(raised.value))[1])
    TASKS["common_words"].build(materials[PLAIN], longest, "9")


def test_text_spans_lie_in_the_window(materials) -> None:
    example = TASKS["text"].build(materials[RECALL], LENGTH, "8")
    assert isinstance(example, TextExample)
    assert len(example.ids) == LENGTH
    starts, stops = zip(*example.spans, strict=True)
    assert stops[-1] == LENGTH and starts[0] >= 0.75 * LENGTH - 32
    assert starts[1:] == stops[:-1]
    decoded = materials[RECALL].tokenizer.decode(example.ids[1:])
    assert decoded in text.held_out_text()


def test_the_split_is_the_one_that_the_embedded_model_was_trained_with() -> None:
    """Written out here, because a changed split would put training words into the evaluation."""
    from benchmark.recall_model.corpus import Document
    from benchmark.recall_model.words import invented

    def held_out(name: str, permille: int) -> bool:
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 1000 < permille

    def word_held_out(word: str) -> bool:
        return held_out(f"held-out-1:{word}", 100)

    for topic in ("ftplib", "http", "argparse", "topic-numeric-types", "topic-lambda"):
        expected = held_out(f"python/{topic}", 20)
        assert text.topic_is_held_out(topic) == expected
        assert Document("python", topic, "").is_validation == expected
    assert all(word_held_out(word) for word in text.invented_held_out_words(50))
    assert all(word_held_out(word) for word in text.held_out_words())
    assert not any(word_held_out(word) for word in invented(200, seed=2))
    assert len(text.held_out_text()) > 200_000


@pytest.mark.parametrize("count", [1, 7, 30])
@pytest.mark.parametrize("name", ["single", "long_generation", "text"])
def test_as_many_questions_as_asked(materials, name: str, count: int) -> None:
    examples = build_examples(TASKS[name], name, materials[RECALL], LENGTH, count, 0)
    assert sum(map(questions, examples)) == count


def test_a_length_without_room_is_refused(materials) -> None:
    with pytest.raises(ContextTooShort):
        materials[RECALL].weave(["# many words here123456"] * 20, 100, __import__("random"))
    with pytest.raises(ContextTooShort, match="held-out text"):
        TASKS["text"].build(materials[RECALL], 10**6, "0")


def test_keys_run_out_with_an_error() -> None:
    import random

    keys = Keys(["one", "two"], random.Random(0))
    with pytest.raises(ContextTooShort, match="2 words"):
        for _ in range(10):
            keys.draw()


def test_grades() -> None:
    exact = Turn("q", (" a b",), 5, exact=True, stop="\n")
    assert exact.grade(" a b\nmore") == 1.0 and exact.grade(" a b c\n") == 0.0
    parts = Turn("q", ("12", "34"), 5)
    assert [parts.grade(t) for t in ("12 and 34", "34", "no")] == [1.0, 0.5, 0.0]


def test_a_chat_template_goes_around_context_and_question(materials) -> None:
    class Templated:
        def apply_chat_template(self, messages, **kwargs) -> str:
            return f"<u>{messages[0]['content']}</u><a>"

    prompt = Prompt(Templated(), chat=True)
    turn = Turn("why?", ("because",), 3, prefix=" It is")
    assert prompt.context(Example("text ", ())) + prompt.turn(turn) == "<u>text why?</u><a>It is"
    bare = Prompt(materials[PLAIN].tokenizer, chat=False)
    assert bare.context(Example("text ", ())) + bare.turn(turn) == "text why? It is"
