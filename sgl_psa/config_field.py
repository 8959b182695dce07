"""A setting's type, default and help, and the check of a value against them."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Meta


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
    return f"{text}, or {field.word}" if field.word else text
