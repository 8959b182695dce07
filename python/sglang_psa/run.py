"""``python -m sglang_psa.run MODULE ARGS...``: load SGLang's plugins, then run a module.

SGLang's ``bench_one_batch``, ``bench_offline_throughput`` and similar tools parse their arguments
before they load plugins, or never load them; under this runner they know ``--attention-backend
psa`` and the ``--psa-*`` flags.
"""

from __future__ import annotations

import runpy
import sys

from sglang_psa import compat

USAGE = "usage: python -m sglang_psa.run MODULE [ARGS...]   e.g. sglang.bench_one_batch --help"


def main(argv: list[str]) -> None:
    """Run ``argv[0]`` as ``__main__`` with the remaining arguments."""
    if not argv or argv[0].startswith("-"):
        sys.exit(USAGE)
    compat.every_process_kind = True
    compat.load_plugins()
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
