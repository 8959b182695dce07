"""The README states the truth about what can be checked cheaply."""

import re
from pathlib import Path

from sgl_psa.config import fields

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_it_lists_every_flag_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(--psa-[a-z-]+)` \| `?([^|`]*?)`? \|", README, re.MULTILINE))
    default = {f"--psa-{f.name.replace('_', '-')}": str(f.default).lower() for f in fields()}
    assert rows == default


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) - {"and"} <= targets


def test_every_result_names_a_module_that_exists() -> None:
    modules = set(re.findall(r"python -m (benchmark[\w.]*)", README))
    missing = [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
    assert modules and missing == []
