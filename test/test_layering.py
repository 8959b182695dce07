"""The three layers import only downward; the tree stays readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "sglang_psa": ROOT / "python" / "sglang_psa",
    "sgl_psa": ROOT / "sgl_psa",
    "sgl_psa_kernels": ROOT / "kernels" / "sgl_psa_kernels",
}
#: layer -> top-level packages that it must not import.
FORBIDDEN = {
    "sglang_psa": set(),
    "sgl_psa": {"sglang", "sglang_psa"},
    "sgl_psa_kernels": {"sglang", "sglang_psa", "sgl_psa"},
}


def sources(layer: str) -> list[Path]:
    return sorted(LAYERS[layer].rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """Top-level names of absolute imports anywhere in a file, ``importlib`` strings included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", ""))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value).split(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_goes_upward(layer: str) -> None:
    files = sources(layer)
    assert files, f"layer {layer} has no sources under {LAYERS[layer]}"
    upward = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) & FORBIDDEN[layer])
        for path in files
    }
    assert {path: names for path, names in upward.items() if names} == {}


def test_walk_sees_a_planted_upward_import(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from sglang.srt import server_args\n    return server_args\n")
    assert imported_packages(planted) & FORBIDDEN["sgl_psa"] == {"sglang"}


def test_no_source_file_is_longer_than_400_lines() -> None:
    suffixes = {".py", ".cpp", ".h"}
    folders = [*LAYERS.values(), ROOT / "test", ROOT / "benchmark"]
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in suffixes and (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
