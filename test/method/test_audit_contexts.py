"""Contexts of the audit: exact lengths, answerable questions, any tokenizer."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sgl_psa.audit.capture import EMBEDDED_MODEL
from sgl_psa.audit.contexts import make_context
from sgl_psa.evaluate.material import ContextTooShort


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no start mark: it knows nothing of the line language."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module", params=["embedded", "bytes"])
def tokenizer(request):
    return (
        byte_tokenizer()
        if request.param == "bytes"
        else AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    )


@pytest.mark.parametrize("length, tail", [(400, 40), (1024, 10), (3001, 24)])
def test_lengths_are_exact(tokenizer, length: int, tail: int) -> None:
    context = make_context(tokenizer, length, tail, seed=0)
    assert len(context.ids) == length and context.first == length - tail
    assert all(isinstance(i, int) for i in context.ids)


def test_questions_ask_for_lines_of_the_body(tokenizer) -> None:
    context = make_context(tokenizer, 2000, 200, seed=1)
    body = tokenizer.decode(context.ids[: context.first]).splitlines()
    asked = tokenizer.decode(context.ids[context.first :]).splitlines()[:-1]
    assert len(asked) > 3
    assert all("# " + line.removeprefix("? ") in body for line in asked)
    set_lines = [line for line in body if line.startswith("# ")]
    assert 0.2 < sum(map(len, set_lines)) / sum(map(len, body)) < 0.5


def test_the_seed_decides(tokenizer) -> None:
    one, same, other = (make_context(tokenizer, 500, 20, seed=seed) for seed in (3, 3, 4))
    assert one == same and one.ids != other.ids


def test_a_context_without_room_is_refused(tokenizer) -> None:
    with pytest.raises(ContextTooShort, match="longer length"):
        make_context(tokenizer, 40, 30, seed=0)


def test_the_wrapper_does_not_import_contexts_or_transformers() -> None:
    probe = """
import sys
import sgl_psa.wrapper
loaded = [m for m in sys.modules if m.startswith(("sgl_psa.evaluate", "transformers"))]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
