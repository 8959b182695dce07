"""A hook that did not take must stop the start, whatever made it fail."""

import sys
import types

import pytest
from sglang_psa import compat, hooks
from sglang_psa.hooks import Hook, HookNotApplied, Kind


class Target:
    def method(self):
        return "method"

    @classmethod
    def make(cls):
        return "make"

    @staticmethod
    def help():
        return "help"


@pytest.fixture
def module(monkeypatch):
    """A throw-away module to hook, and SGLang's registry without anything of ours left after."""
    made = types.ModuleType("psa_hook_target")
    made.Target = type("Target", (Target,), dict(Target.__dict__))
    made.function = lambda: "function"
    monkeypatch.setitem(sys.modules, "psa_hook_target", made)
    registry = compat.HookRegistry
    monkeypatch.setattr(registry, "_hooks", type(registry._hooks)(list))
    monkeypatch.setattr(registry, "_patched", set())
    monkeypatch.setattr(hooks, "_installed", [])
    return made


def apply(*given):
    hooks.install(given)
    compat.HookRegistry.apply_hooks()


def around(original, *args):
    return "around " + original(*args)


@pytest.mark.parametrize("name", ["function", "Target.method", "Target.make", "Target.help"])
def test_applied_hooks_verify_and_act(module, name):
    apply(Hook("test", f"psa_hook_target.{name}", around, Kind.AROUND, "any"))
    hooks.verify()
    owner = module.Target() if "." in name else module
    assert getattr(owner, name.split(".")[-1])() == f"around {name.split('.')[-1]}"


def test_class_replacement_verifies(module):
    class Better(module.Target):
        pass

    apply(Hook("class", "psa_hook_target.Target", Better, Kind.REPLACE, "any"))
    hooks.verify()
    assert module.Target is Better


@pytest.mark.parametrize(
    "target", ["psa_hook_target.Target.gone", "psa_hook_target.gone", "no_such_module.Thing.method"]
)
def test_missing_target_is_named_with_hook_and_version(module, target):
    apply(Hook("my hook", target, around, Kind.AROUND, "any"))
    with pytest.raises(HookNotApplied) as caught:
        hooks.verify()
    message = str(caught.value)
    assert "my hook" in message and target in message and compat.sglang_version() in message


def test_target_replaced_afterwards_is_noticed(module):
    apply(Hook("my hook", "psa_hook_target.Target.method", around, Kind.AROUND, "any"))
    module.Target.method = lambda self: "someone else's"
    with pytest.raises(HookNotApplied, match="replaced"):
        hooks.verify()


def test_another_plugins_hook_on_the_same_target_is_fine(module):
    target = "psa_hook_target.Target.method"
    hooks.install([Hook("ours", target, around, Kind.AROUND, "any")])
    compat.HookRegistry.register(target, lambda r, *a: r + " after", compat.HookType.AFTER)
    compat.HookRegistry.apply_hooks()
    hooks.verify()
    assert module.Target().method() == "around method after"


def test_hook_registered_too_late_is_noticed(module):
    target = "psa_hook_target.Target.method"
    compat.HookRegistry.register(target, lambda r, *a: r, compat.HookType.AFTER)
    compat.HookRegistry.apply_hooks()
    apply(Hook("late", target, around, Kind.AROUND, "any"))
    with pytest.raises(HookNotApplied, match="late"):
        hooks.verify()


def test_no_hooks_at_all_is_an_error(module):
    with pytest.raises(HookNotApplied, match="did not load its plugin"):
        hooks.verify()


def test_process_kinds_choose_hooks(module, monkeypatch):
    monkeypatch.setattr(compat, "process_kinds", lambda: frozenset({"scheduler"}))
    given = [
        Hook(kind, "psa_hook_target.function", around, Kind.AROUND, kind)
        for kind in ("main", "scheduler", "any")
    ]
    hooks.install(given)
    assert [h.name for h in hooks.installed()] == ["scheduler", "any"]


def test_scheduler_is_told_by_its_entry_function():
    def run_scheduler_process():
        return compat.process_kinds()

    assert run_scheduler_process() == {"scheduler"}
    assert compat.process_kinds() == {"main"}
