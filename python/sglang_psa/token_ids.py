"""Token ids that a client sends instead of text: refused when the model does not have them.

SGLang 0.5.17 passes any number on, and the embedding lookup then ends the scheduler.
"""

from __future__ import annotations

from typing import Any

from sgl_psa.config import ConfigError


def check_token_ids(manager: Any, obj: Any) -> None:
    """Check ``obj.input_ids``, one list or a list of one a prompt; none is fine.

    Args:
        manager: SGLang's tokenizer manager.
        obj: a request of SGLang's tokenizer manager.

    Raises:
        ConfigError: naming the first id that is out of range, and the range.
    """
    given = getattr(obj, "input_ids", None)
    if not given:
        return
    size = manager.model_config.vocab_size
    for ids in given if isinstance(given[0], list) else [given]:
        if ids and not (min(ids) >= 0 and max(ids) < size):
            bad = next(i for i in ids if not 0 <= i < size)
            raise ConfigError(
                f"input_ids: {bad} is no token of this model, ids are 0 to {size - 1}"
            )
