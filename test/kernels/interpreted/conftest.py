"""Triton kernels in Triton's interpreter; ``test_triton.py`` runs them in a process of their own.

TRITON_INTERPRET must be set before Triton is imported, and nothing else should see it:

    TRITON_INTERPRET=1 python -m pytest test/kernels/interpreted

Every launch costs Python time, so the shapes are small.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
