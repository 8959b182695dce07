"""Use a second thread only while another core is free (Linux; elsewhere one thread).

Parallel regions wait for their slowest thread, so two threads on contended cores are slower
than one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STAT, _OWN = Path("/proc/stat"), Path("/proc/self/stat")


class AdaptiveThreads:
    """Call `adjust` every few seconds."""

    def __init__(self, most: int | None = None) -> None:
        self.most = min(2, os.cpu_count() or 1) if most is None else most
        self.count = 1
        self._last: tuple[int, int, int] | None = None
        torch.set_num_threads(1)

    def adjust(self) -> int:
        if self.most < 2 or not _STAT.exists():
            return self.count
        fields = [int(x) for x in _STAT.read_text().split("\n")[0].split()[1:9]]
        own = _OWN.read_text().rsplit(") ", 1)[1].split()
        idle, total, mine = fields[3] + fields[4], sum(fields), int(own[11]) + int(own[12])
        if self._last is not None:
            span = max(1, total - self._last[1])
            busy = span - (idle - self._last[0])
            cores = os.cpu_count() or 1
            others = (busy - (mine - self._last[2])) * cores / span
            wanted = 2 if others < cores - 1.75 else 1
            if wanted != self.count:
                self.count = wanted
                torch.set_num_threads(wanted)
        self._last = (idle, total, mine)
        return self.count
