"""A setting's type, default and help, and the check of a value against them."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import msgspec
from msgspec import Meta

#: Marks a number of bytes, which may be given as 512M.
BYTES = {"unit": "bytes"}
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field and what to change."""


@dataclass(frozen=True)
class ConfigField:
    """One setting: its name, annotated type, default and one-line help."""

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def kind(self) -> type:
        """The plain Python type: str, int, float or bool; of the numbers of a setting that also
        takes a word."""
        if self.word:
            return typing.get_args(self._number)[0]
        base = typing.get_args(self.annotation)[0]
        return type(self.choices[0]) if self.choices else base

    @property
    def word(self) -> str:
        """The word that a setting of a number takes besides, or nothing."""
        base = typing.get_args(self.annotation)[0]
        if typing.get_origin(base) not in (types.UnionType, typing.Union):
            return ""
        return typing.get_args(typing.get_args(base)[1])[0]

    @property
    def _number(self) -> Any:
        """The annotated number of a setting that also takes a word, else the annotation."""
        base = typing.get_args(self.annotation)[0]
        return typing.get_args(base)[0] if self.word else self.annotation

    @property
    def in_bytes(self) -> bool:
        """Whether the setting is a number of bytes."""
        return any(m.extra == BYTES for m in self.annotation.__metadata__ if isinstance(m, Meta))

    @property
    def choices(self) -> tuple[Any, ...]:
        """Allowed values of an enumerated setting, else empty."""
        base = typing.get_args(self.annotation)[0]
        return typing.get_args(base) if typing.get_origin(base) is Literal else ()


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key that does not exist, naming the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"{where}: unknown key {key!r}; {hint}known keys: {', '.join(known)}")


def parse_bytes(text: str) -> int | None:
    """The bytes of ``4096``, ``512M``, ``1.5G`` or ``8GiB``, in powers of 1024; ``None`` if
    ``text`` is nothing of the kind."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    size = Fraction(match[1]) * 2 ** _UNITS[match[2].upper()]
    return int(size) if size.denominator == 1 else None


def check_value(field: ConfigField, value: Any, where: str) -> Any:
    """``value`` as the field's type.

    Raises:
        ConfigError: naming ``where``, the value, and what is allowed.
    """
    problem = f"{where}={value!r}"
    if isinstance(value, bool) and field.kind is not bool:
        raise ConfigError(f"{problem}: expected {_expectation(field)}, got a boolean")
    if field.word and value == field.word:
        return value
    if isinstance(value, str) and field.in_bytes:
        value = parse_bytes(value)
    if isinstance(value, str) and field.kind is int and field.choices:
        try:
            value = int(value)
        except ValueError:
            raise ConfigError(f"{problem}: expected {_expectation(field)}") from None
    try:
        converted = msgspec.convert(value, field._number, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{problem}: expected {_expectation(field)}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"{problem}: expected {_expectation(field)}")
    return converted


def _expectation(field: ConfigField) -> str:
    if field.choices:
        return "one of " + ", ".join(str(c) for c in field.choices)
    if field.kind is bool:
        return "true or false"
    if field.kind is str:
        return "text"
    meta = next(m for m in field._number.__metadata__ if isinstance(m, Meta))
    noun = "an integer" if field.kind is int else "a number"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", meta.gt), (">=", meta.ge), ("<", meta.lt), ("<=", meta.le))
        if bound is not None
    ]
    text = " ".join([noun, " and ".join(bounds)]).strip()
    if field.in_bytes:
        text += " of bytes, or such as 512M or 8G"
    return f"{text}, or {field.word}" if field.word else text
