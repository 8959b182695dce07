"""Choice of an operator's implementation by name."""

from collections.abc import Callable, Mapping
from typing import TypeVar

#: Those that run on any machine. "triton" needs a CUDA device (or TRITON_INTERPRET=1).
BACKENDS = ("reference", "torch", "cpu")

F = TypeVar("F", bound=Callable[..., object])


def choose(backend: str, implementations: Mapping[str, F], op: str) -> F:
    """Return ``implementations[backend]``.

    Raises:
        ValueError: ``backend`` is not one of the names in ``implementations``.
    """
    implementation = implementations.get(backend)
    if implementation is None:
        choices = ", ".join(repr(name) for name in implementations)
        raise ValueError(f"{op}: unknown backend {backend!r}; choose one of {choices}")
    return implementation
