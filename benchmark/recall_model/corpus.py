"""Ordinary text for the language-model half, from permissively licensed documentation.

Only files that a normal development machine already holds are read.  A source that is absent
is skipped with a printed line.  Documents are split into training and validation by a hash of
their *topic* (for Python: the top-level module), so that a module's source code and the text
extracted from it never fall on different sides.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sgl_psa.evaluate.text import HELD_OUT_TOPIC_PERMILLE, bucket, clean

LICENCES = {
    "python": "PSF-2.0 (Python standard library sources and reference topics)",
    "cmake": "BSD-3-Clause (CMake help)",
    "node": "MIT (Node.js documentation)",
    "rust": "MIT or Apache-2.0 (the Rust books)",
}
MAX_CHARACTERS = 300_000

_SKIPPED_PYTHON = ("site-packages", "test", "tests", "idlelib", "encodings", "ensurepip")
_RUST_BOOKS = (
    "book",
    "reference",
    "nomicon",
    "cargo",
    "rustc",
    "rustdoc",
    "edition-guide",
    "rust-by-example",
    "clippy",
    "embedded-book",
    "unstable-book",
    "style-guide",
)


@dataclass(frozen=True)
class Document:
    """One text with its source (a key of LICENCES) and the topic that decides its split."""

    source: str
    topic: str
    text: str

    @property
    def is_validation(self) -> bool:
        return bucket(f"{self.source}/{self.topic}") < HELD_OUT_TOPIC_PERMILLE


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""


def _python_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_PYTHON for part in parts) or parts[0].startswith("_sysconfigdata"):
            continue
        if parts[0] != "pydoc_data":
            yield Document("python", Path(parts[0]).stem, _read(path))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document("python", f"topic-{name}", text)


def _cmake_documents() -> Iterator[Document]:
    for root in sorted(Path("/usr/share").glob("cmake*/Help")):
        for path in sorted(root.rglob("*.rst")):
            yield Document("cmake", path.stem, _read(path))


def _node_documents() -> Iterator[Document]:
    root = Path("/usr/share/doc/nodejs")
    for path in sorted([*root.glob("api/*.md"), *root.glob("contributing/**/*.md")]):
        if path.name != "all.md":
            yield Document("node", path.stem, _read(path))


def _rust_documents() -> Iterator[Document]:
    if shutil.which("rustc") is None:
        return
    answer = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True)
    root = Path(answer.stdout.strip()) / "share" / "doc" / "rust" / "html"
    for book in _RUST_BOOKS:
        for path in sorted((root / book).rglob("*.html")):
            main = re.search(r"<main>(.*?)</main>", _read(path), re.S)
            if main is None or path.name in ("print.html", "toc.html"):
                continue
            bare = re.sub(r"<(script|style).*?</\1>", "", main.group(1), flags=re.S)
            yield Document(
                "rust", f"{book}/{path.stem}", html.unescape(re.sub(r"<[^>]+>", "", bare)).strip()
            )


def collect() -> list[Document]:
    """All cleaned documents of 500 to MAX_CHARACTERS characters, in a fixed order."""
    documents: list[Document] = []
    readers = {
        "python": _python_documents,
        "cmake": _cmake_documents,
        "node": _node_documents,
        "rust": _rust_documents,
    }
    for source, reader in readers.items():
        found = [Document(d.source, d.topic, clean(d.text)) for d in reader()]
        found = [d for d in found if 500 < len(d.text) < MAX_CHARACTERS]
        size = sum(len(d.text) for d in found) / 1e6
        note = f"{len(found)} documents, {size:.1f} MB" if found else "absent, skipped"
        print(f"corpus: {source}: {note}", flush=True)
        documents += found
    return documents
