"""Instruction sets of the CPU kernels: compiler flags, and which ones this CPU has.

The same sources are compiled once per instruction set into separate shared objects.
"""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ISA:
    """One build variant of the kernels."""

    name: str
    cpu_flags: frozenset[str]
    """Names in /proc/cpuinfo that the CPU must have."""
    compiler_flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")

_AVX512 = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)
_AVX2_CPU = frozenset({"avx2", "fma", "f16c"})
_AVX512_CPU = _AVX2_CPU | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

_VNNI = (*_AVX512, "-mavx512vnni")
_VNNI_CPU = _AVX512_CPU | {"avx512_vnni"}

_VBMI = (*_VNNI, "-mavx512vbmi")
_VBMI_CPU = _VNNI_CPU | {"avx512vbmi"}

ISAS = (
    ISA("avx512bf16", _VBMI_CPU | {"avx512_bf16"}, (*_VBMI, "-mavx512bf16")),
    ISA("avx512vbmi", _VBMI_CPU, _VBMI),
    ISA("avx512vnni", _VNNI_CPU, _VNNI),
    ISA("avx512", _AVX512_CPU, _AVX512),
    ISA("avx2", _AVX2_CPU, _AVX2),
    ISA("portable", frozenset(), ()),
)
"""Best first."""


def by_name(name: str) -> ISA:
    """The instruction set of that name.

    Raises:
        ValueError: there is none.
    """
    for isa in ISAS:
        if isa.name == name:
            return isa
    names = ", ".join(isa.name for isa in ISAS)
    raise ValueError(f"unknown instruction set {name!r}; choose one of {names}")


@cache
def cpu_flags() -> frozenset[str]:
    """Feature names of this CPU; empty where /proc/cpuinfo does not tell."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def supported() -> tuple[ISA, ...]:
    """Instruction sets that this CPU can run, best first."""
    return tuple(isa for isa in ISAS if isa.cpu_flags <= cpu_flags())


def buildable() -> tuple[ISA, ...]:
    """Instruction sets that a compiler for this machine's architecture can produce."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ISAS
    return tuple(isa for isa in ISAS if not isa.cpu_flags)
