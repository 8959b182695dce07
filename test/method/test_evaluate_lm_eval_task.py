"""Our questions written down for lm-eval."""

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from sgl_psa.evaluate import cli, lm_eval_task

LENGTH = 1300


@pytest.mark.parametrize("task", ["single", "tracking"])
def test_the_files_hold_whole_prompts_that_keep_the_length(tmp_path, task: str) -> None:
    arguments = ["--task", task, "--length", str(LENGTH), "--queries", "12"]
    assert lm_eval_task.main([*arguments, "--out", str(tmp_path)]) == 0
    made = yaml.safe_load((tmp_path / f"psa_{task}.yaml").read_text())
    assert made["task"] == f"psa_{task}" and made["output_type"] == "generate_until"
    assert made["generation_kwargs"]["until"] == ["\n"]
    data = Path(made["dataset_kwargs"]["data_files"]["test"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 12
    tokenizer = AutoTokenizer.from_pretrained(cli.EMBEDDED)
    for row in rows:
        used = len(tokenizer(row["prompt"]).input_ids) + made["generation_kwargs"]["max_gen_toks"]
        assert used <= LENGTH
        *_, question = row["prompt"].splitlines()
        assert re.fullmatch(r"[?>] [a-z ]+", question)
        assert f"{row['answer'][-6:]}\n" in row["prompt"]
        assert row["max_tokens"] > len(tokenizer(row["answer"], add_special_tokens=False).input_ids)


@pytest.mark.parametrize("task", ["long_generation", "text", "common_words", "nothing"])
def test_tasks_that_cannot_be_written_down_are_refused(tmp_path, capsys, task: str) -> None:
    assert lm_eval_task.main(["--task", task, "--out", str(tmp_path)]) == 2
    assert f"--task {task}" in capsys.readouterr().err.replace("'", "")
    assert not list(tmp_path.iterdir())
