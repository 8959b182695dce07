"""What this process knows about the plugin: one place, plain values, no imports of torch or SGLang.

Each SGLang process imports the plugin anew, so nothing here crosses a process boundary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_psa.attention_backend import PSAAttentionBackend

#: Why the plugin could not register, if so. SGLang logs and ignores plugin exceptions, so the
#: start-up check raises this when the psa backend is asked for.
registration_error: Exception | None = None

_backend: PSAAttentionBackend | None = None


def get_backend() -> PSAAttentionBackend | None:
    """The psa attention backend of this scheduler process, ``None`` elsewhere."""
    return _backend


def set_backend(backend: PSAAttentionBackend | None) -> None:
    """Record the backend; called once by its constructor."""
    global _backend
    _backend = backend
