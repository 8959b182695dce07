"""Write the model card from what was measured:
python -m benchmark.recall_model.card --run RUN --model FOLDER

Reads RUN/log.jsonl, FOLDER/config.json and benchmark/recall_model/results/*.json, fills
card_template.md and writes FOLDER/README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
TASKS = {
    "needle": "needle in text",
    "multi_key": "multi-key",
    "all_needle": "all needles",
    "variable": "variable tracking",
}
WORDS = {"in_list": "in list", "held_out": "held out"}


def measured(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Cells and text perplexities of every result file without separator."""
    cells: dict[str, Any] = {}
    perplexity: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if not report["separator"]:
            cells |= report["cells"]
            perplexity |= report["text_perplexity"]
    return cells, perplexity


def table(cells: dict[str, Any]) -> str:
    """One row for each length and word list that has a measured cell."""
    lengths = sorted({int(name.split("/")[1]) for name in cells})
    rows = [["context", "words", *TASKS.values()], ["---"] * (2 + len(TASKS))]
    for length in lengths:
        for words, label in WORDS.items():
            found = [cells.get(f"{task}/{length}/{words}") for task in TASKS]
            if any(found):
                shown = [f"{c['exact_match']:.3f} ({c['n']})" if c else "-" for c in found]
                rows.append([str(length), label, *shown])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fields(run: Path, model: Path, results: Path) -> dict[str, str]:
    """Values of the template's fields."""
    config = json.loads((model / "config.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    start, last = [line for line in log if "seconds" in line][-1], log[-1]
    cells, perplexity = measured(results)
    return {
        "parameters": f"{start['parameters'] / 1e6:.2f}",
        "minutes": f"{start['seconds'] / 60:.0f}",
        "tokens": f"{last['tokens_m']:.1f}",
        "steps": str(last["step"]),
        "layers": str(config["num_hidden_layers"]),
        "width": str(config["hidden_size"]),
        "heads": str(config["num_attention_heads"]),
        "kv_heads": str(config["num_key_value_heads"]),
        "head_dim": str(config["head_dim"]),
        "hidden": str(config["intermediate_size"]),
        "vocabulary": str(config["vocab_size"]),
        "positions": str(config["max_position_embeddings"]),
        "theta": f"{config['rope_parameters']['rope_theta']:,.0f}",
        "table": table(cells),
        "perplexity": ", ".join(
            f"{v} at {k}" for k, v in sorted(perplexity.items(), key=lambda x: int(x[0]))
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model card")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, required=True, help="exported model folder")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    template = Template((HERE / "card_template.md").read_text())
    card = template.substitute(fields(arguments.run, arguments.model, arguments.results))
    (arguments.model / "README.md").write_text(card)


if __name__ == "__main__":
    main()
