"""The range of SGLang versions: refused outside, overridable, and said in words."""

import importlib.metadata
import logging

import pytest
from sglang_psa import compat, plugin, state


def test_installed_sglang_is_in_the_tested_range():
    compat.check_version()


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.6.0", "1.0", "unknown"])
def test_other_versions_are_refused_with_the_range(version, monkeypatch):
    monkeypatch.delenv(compat.ALLOW_UNTESTED, raising=False)
    with pytest.raises(compat.UnsupportedSGLang) as caught:
        compat.check_version(version)
    assert version in str(caught.value)
    assert compat.tested_range() in str(caught.value)
    assert compat.ALLOW_UNTESTED in str(caught.value)


def test_override_turns_the_refusal_into_a_warning(monkeypatch, caplog):
    monkeypatch.setenv(compat.ALLOW_UNTESTED, "1")
    with caplog.at_level(logging.WARNING):
        compat.check_version("0.5.99")
    assert "0.5.99" in caplog.text


@pytest.mark.parametrize("value", ["", "0", "yes"])
def test_override_needs_the_value_one(value, monkeypatch):
    monkeypatch.setenv(compat.ALLOW_UNTESTED, value)
    with pytest.raises(compat.UnsupportedSGLang):
        compat.check_version("0.5.99")


def test_unknown_import_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchThing"):
        compat.NoSuchThing  # noqa: B018


def test_moved_sglang_name_names_it_and_the_range(monkeypatch):
    monkeypatch.setitem(compat.IMPORTS, "Gone", "sglang.srt.plugins:gone")
    with pytest.raises(ImportError, match=r"sglang\.srt\.plugins\.gone.*==0\.5\.17"):
        compat.Gone  # noqa: B018


def test_registration_failure_is_kept_for_the_start_up_check(monkeypatch):
    refused = []
    monkeypatch.setattr(state, "registration_error", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.0")
    monkeypatch.delenv(compat.ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(plugin, "_refuse_psa", refused.append)
    plugin.register()
    assert isinstance(state.registration_error, compat.UnsupportedSGLang)
    assert refused == [state.registration_error]
