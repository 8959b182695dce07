"""SGLang's server arguments plus the ``--psa-*`` flags, generated from ``PSAConfig``'s fields.

The same names work on the command line, in SGLang's ``--config`` YAML file and as keyword
arguments of ``sgl.Engine``. After construction every ``psa_*`` field holds the value in force, so
``/server_info`` shows it and child processes receive it with the arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from sgl_psa.config import ConfigError, ConfigField, PSAConfig, check_value, fields
from sgl_psa.policies import legal
from sglang_psa import (
    compat,
    defaults,
    graph_args,
    hooks,
    model_folder,
    prefix_budgets,
    refusals,
    state,
    tiered_sizes,
)
from sglang_psa.compat import A, Arg, ServerArgs

logger = logging.getLogger(__name__)

PREFIX = "psa_"
BACKEND = "psa"


class StartUpError(ValueError):
    """The server cannot start as asked; the message says what to change."""


def uses_psa(server_args: Any) -> bool:
    """Whether any attention backend of ``server_args`` is psa."""
    return BACKEND in (
        server_args.attention_backend,
        server_args.prefill_attention_backend,
        server_args.decode_attention_backend,
    )


def psa_config(server_args: Any) -> PSAConfig:
    """The settings that ``server_args`` carry; they are complete once it was constructed."""
    return PSAConfig(**{f.name: getattr(server_args, PREFIX + f.name) for f in fields()})


class PSAServerArgs(ServerArgs):
    """``ServerArgs`` with one optional field a setting; ``None`` means not given."""

    def __post_init__(self) -> None:
        if not uses_psa(self):
            self._refuse_idle_flags()
            defaults.apply_cpu_defaults(self)
            super().__post_init__()
            return
        if state.registration_error is not None:
            raise StartUpError(f"--attention-backend psa: {state.registration_error}")
        try:
            self._resolve_psa_config()
            refusals.check(self)
            model_folder.check(self.model_path, weights=self.load_format != "dummy")
            defaults.apply_cpu_defaults(self)
            defaults.apply_psa_defaults(self)
        except ValueError as error:
            raise StartUpError(str(error)) from None
        sizes_given = graph_args.sizes_given(self)
        super().__post_init__()
        if not uses_psa(self):
            raise StartUpError(
                f"SGLang runs this model with the {self.attention_backend!r} attention backend "
                "only: serve it without --attention-backend psa"
            )
        self._refuse_illegal()
        if not sizes_given:
            graph_args.limit_sizes(self, self.get_model_config())

    def check_server_args(self) -> None:
        """SGLang's own check, then ours: every hook in place, no illegal combination."""
        super().check_server_args()
        if uses_psa(self):
            hooks.verify()
            self._refuse_illegal()

    def _refuse_illegal(self) -> None:
        try:
            model = self.get_model_config()
            refusals.check(self, model)
            prefix_budgets.check_prior(psa_config(self), model)
            tiered_sizes.check_tiers(psa_config(self), self, model)
        except ValueError as error:
            raise StartUpError(str(error)) from None

    def _refuse_idle_flags(self) -> None:
        names = ["psa_config", *(PREFIX + f.name for f in fields())]
        given = [n for n in names if getattr(self, n) is not None]
        if given:
            flags = ", ".join("--" + n.replace("_", "-") for n in given)
            raise StartUpError(
                f"{flags}: no effect without --attention-backend psa (or "
                "--decode-attention-backend psa); add it or drop the flag"
            )

    def _resolve_psa_config(self) -> None:
        flags = {f.name: getattr(self, PREFIX + f.name) for f in fields()}
        config = PSAConfig.from_sources(flags, self.psa_config)
        caution = legal.caution(config)
        if caution is not None:
            logger.warning("PSA: %s", caution)
        for name, value in config.as_dict().items():
            setattr(self, PREFIX + name, value)


def _parse_flag(field: ConfigField, text: str) -> Any:
    try:
        return check_value(field, text, where="value")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag(field: ConfigField) -> Any:
    """The annotation that makes SGLang generate the flag of ``field``."""
    choices = f" Choices: {', '.join(map(str, field.choices))}." if field.choices else ""
    default = "none" if field.default == "" else field.default
    arg = Arg(
        help=f"PSA: {field.help}{choices} Default: {default}.",
        type_parser=functools.partial(_parse_flag, field),
        # A boolean flag may stand alone, or carry a value as YAML files give it.
        nargs="?" if field.kind is bool else None,
        const=True if field.kind is bool else None,
    )
    return A[Any, arg]


def _add_fields() -> None:
    annotations = {PREFIX + f.name: _flag(f) for f in fields()}
    document = Arg(help="PSA: settings as JSON text or the path of a JSON file; flags win over it.")
    annotations["psa_config"] = A[Any, document]
    PSAServerArgs.__annotations__ = annotations
    for name in annotations:
        setattr(PSAServerArgs, name, None)
    dataclasses.dataclass(PSAServerArgs)
    PSAServerArgs.__init__ = _name_nearest(PSAServerArgs.__init__)  # type: ignore[method-assign]


def _name_nearest(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in dataclasses.fields(self) if f.name.startswith(PREFIX)]
        for key in kwargs:
            if key.startswith(PREFIX) and key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise StartUpError(f"unknown argument {key!r}; did you mean {near!r}?")
        init(self, *args, **kwargs)

    return wrapper


_add_fields()


def register() -> None:
    """Make ``psa`` a choice of the backend flags, and refusals one line instead of a traceback."""
    if BACKEND not in compat.attention_backend_choices:
        compat.add_attention_backend_choices([BACKEND])
    # The engine class keeps the class it saw at import; a REPLACE hook does not reach it.
    if "sglang.srt.entrypoints.engine" in sys.modules:
        compat.Engine.server_args_class = PSAServerArgs
    if "main" in compat.process_kinds():
        sys.excepthook = _one_line(sys.excepthook)


def _one_line(previous: Callable[..., Any]) -> Callable[..., Any]:
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, (StartUpError, hooks.HookNotApplied)):
            print(f"sgl-psa: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    return hook


HOOKS = (
    hooks.Hook(
        name="server arguments",
        target=compat.SERVER_ARGS,
        function=PSAServerArgs,
        kind=hooks.Kind.REPLACE,
        process="any",
    ),
)
