"""The servers under comparison, one table, and the flags that each is started with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang_psa.pool_hooks import summary_bytes

from sgl_psa.config import HostDtypeName, PSAConfig
from sgl_psa.evaluate.cli import EMBEDDED

PAGE_SIZE = 16
CHUNK_TOKENS = 2048
CONTEXT_TOKENS = 16384
#: Sparse from here on, so that every prompt of the traces is.
MIN_CONTEXT = 1024
#: Pages that prompts and answers may leave unused, a client.
_SPARE_PAGES = 8
EVEN = "even"


@dataclass(frozen=True)
class System:
    """A server.

    Attributes:
        arena: share of the trace's KV that the device tier holds; ``None``: all-resident.
        host: ``memory`` or ``file``.
        host_dtype: as in ``PSAConfig``.
        like: all-resident with no more device bytes than this tiered system.
    """

    name: str
    arena: float | None = None
    replacement: str = "demand"
    pipeline: bool = True
    host: str = "memory"
    host_dtype: HostDtypeName = "auto"
    like: System | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What tells its rows from those of others."""
        tiered = self.arena is not None
        return {
            "system": self.name,
            "arena_fraction": self.arena,
            "placement": ("even" if self.replacement == EVEN else "uneven") if tiered else None,
            "replacement": self.replacement if tiered else None,
            "pipeline": ("on" if self.pipeline else "off") if tiered else None,
            "host_kind": self.host if tiered else None,
        }


RESIDENT = System("resident")
FULL = System("arena 100 %", 1.0)
HALF = System("arena 50 %", 0.5)
QUARTER = System("arena 25 %", 0.25)
TENTH = System("arena 10 %", 0.1)
SAME_BYTES = System("resident, bytes of 25 %", like=QUARTER)
#: Those that are compared closely are up at the same time and take turns.
ARENAS = ((RESIDENT, FULL, HALF), (QUARTER, TENTH))
VARIANTS = (
    (RESIDENT, FULL, HALF),
    (
        QUARTER,
        System("25 %, lru", 0.25, "lru"),
        System("25 %, layer-even", 0.25, EVEN),
        System("25 %, stop-and-go", 0.25, pipeline=False),
    ),
    (
        TENTH,
        System("10 %, layer-even", 0.1, EVEN),
        System("25 %, file", 0.25, host="file"),
        System("25 %, file, stop-and-go", 0.25, pipeline=False, host="file"),
    ),
    (
        System("10 %, file", 0.1, host="file"),
        System("10 %, file, layer-even", 0.1, EVEN, host="file"),
    ),
)
CAPACITY = ((SAME_BYTES, QUARTER),)


class Model(NamedTuple):
    """Shape of the served model's KV."""

    folder: Path
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    context: int = CONTEXT_TOKENS

    @classmethod
    def of(cls, folder: Path, dtype: str) -> Model:
        """That of a folder, by its ``config.json``."""
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            folder,
            config["num_hidden_layers"],
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            dtype,
            min(config.get("max_position_embeddings", CONTEXT_TOKENS), CONTEXT_TOKENS),
        )

    @classmethod
    def embedded(cls, dtype: str) -> Model:
        """The one that the package ships."""
        return cls.of(EMBEDDED, dtype)

    @property
    def page_bytes(self) -> int:
        """K and V of a page in all layers."""
        size = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * PAGE_SIZE * size

    @property
    def summary_bytes(self) -> float:
        """Sketches of a page in all layers; always on the device tier."""
        per_layer = summary_bytes(PSAConfig(), PAGE_SIZE, self.kv_heads, self.head_dim)
        return self.layers * per_layer


class Sizes(NamedTuple):
    """Bytes and tokens of one server.

    Attributes:
        kv_bytes: K and V of all that the trace makes.
        device_bytes: frames, or the whole pool, and sketches.
        tokens: that the server has room for.
        arena_bytes: frames; 0 if all-resident.
    """

    kv_bytes: int
    device_bytes: int
    tokens: int
    arena_bytes: int


def kv_bytes(model: Model, kv_tokens: int) -> int:
    """K and V of so many tokens, in whole pages."""
    return -(-kv_tokens // PAGE_SIZE) * model.page_bytes


def sizes(system: System, model: Model, kv_tokens: int, clients: int) -> Sizes:
    """For a trace of ``kv_tokens`` tokens and so many clients."""
    kv = kv_bytes(model, kv_tokens)
    pages = kv // model.page_bytes + _SPARE_PAGES * clients
    if system.like is not None:
        room = sizes(system.like, model, kv_tokens, clients).device_bytes
        pages = int(room // (model.page_bytes + model.summary_bytes))
        return Sizes(kv, room, pages * PAGE_SIZE, 0)
    arena = 0 if system.arena is None else int(system.arena * kv)
    kept = arena if system.arena is not None else pages * model.page_bytes
    return Sizes(kv, int(kept + pages * model.summary_bytes), pages * PAGE_SIZE, arena)


def flags(
    system: System, model: Model, sized: Sizes, clients: int, device: str, host_folder: Path
) -> list[str]:
    """Of ``sglang.launch_server``."""
    made: dict[str, Any] = {
        "model-path": model.folder,
        "device": device,
        "dtype": model.dtype,
        "page-size": PAGE_SIZE,
        "context-length": model.context,
        "chunked-prefill-size": CHUNK_TOKENS,
        "max-running-requests": clients,
        "mem-fraction-static": 0.5,
        "attention-backend": "psa",
        "psa-min-context": MIN_CONTEXT,
    }
    if device == "cuda":
        # The only kernels with tiers there; the all-resident server runs them too.
        made |= {"psa-backend": "triton", "mem-fraction-static": 0.85}
    if system.arena is None:
        made["max-total-tokens"] = sized.tokens
    else:
        # The first page takes what padding rows write.
        host_bytes = (sized.tokens // PAGE_SIZE + 1) * model.page_bytes
        made |= {
            "psa-device-pool-bytes": sized.arena_bytes,
            "psa-host-pool-bytes": host_bytes,
            "psa-placement": system.replacement,
            "psa-pipeline": str(system.pipeline).lower(),
        }
        if system.host == "file":
            made["psa-host-path"] = host_folder
        if system.host_dtype != "auto":
            made["psa-host-dtype"] = system.host_dtype
    return [part for name, value in made.items() for part in (f"--{name}", str(value))]
