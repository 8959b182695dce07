"""A missing or damaged model folder: the message names it."""

import json
import struct

import pytest
from sglang_psa import model_folder
from sglang_psa.model_folder import ModelFolderError

CONFIG = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def test_good_folder_passes(folder):
    model_folder.check(str(folder))


def test_hub_names_are_left_to_sglang():
    model_folder.check("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "missing", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(ModelFolderError, match=r"does not exist") as caught:
        model_folder.check(path)
    assert path in str(caught.value)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        model_folder.check(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_bad_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        model_folder.check(str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no weights"):
        model_folder.check(str(folder))
    model_folder.check(str(folder), weights=False)


@pytest.mark.parametrize("keep, what", [(4, "cut off"), (20, "cut off"), (-3, "cut off")])
def test_truncated_weights(folder, keep, what):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFolderError, match=what) as caught:
        model_folder.check(str(folder))
    assert "model.safetensors" in str(caught.value)


def test_garbage_weights(folder):
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + bytes(9)
    )
    with pytest.raises(ModelFolderError, match="unreadable"):
        model_folder.check(str(folder))
