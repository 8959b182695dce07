"""Look at a local model folder before SGLang does, to say plainly what is wrong with it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class ModelFolderError(ValueError):
    """The model folder is missing or damaged; the message names it."""


def check(model_path: str, weights: bool = True) -> None:
    """Check a local folder; a name of the form ``org/model`` that is no folder is left alone.

    Args:
        model_path: folder or hub name.
        weights: whether weight files are needed (not with dummy weights).

    Raises:
        ModelFolderError: naming the folder or the file and what is wrong.
    """
    folder = Path(model_path).expanduser()
    if not folder.exists():
        looks_local = model_path.startswith((".", "~", os.sep)) or model_path.count("/") != 1
        if looks_local:
            raise ModelFolderError(
                f"model folder {model_path!r} does not exist: pass --model-path an existing "
                "folder with config.json and weights"
            )
        return
    if folder.is_file():
        return
    _check_config(folder)
    if weights:
        _check_weights(folder)


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"model folder {str(folder)!r} has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelFolderError(f"{str(path)!r} names no architecture: it is not a model's config")


def _check_weights(folder: Path) -> None:
    found = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    if not found:
        raise ModelFolderError(
            f"model folder {str(folder)!r} has no weights ({', '.join(WEIGHTS)})"
        )
    for path in found:
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """Header readable, and as many bytes behind it as it promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ModelFolderError(f"weights file {str(path)!r} is damaged: its header is cut off")
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelFolderError(
                f"weights file {str(path)!r} is damaged: its header is unreadable"
            ) from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ModelFolderError(
            f"weights file {str(path)!r} is cut off: {size} of {expected} bytes; fetch it again"
        )
