"""The files of the host tier of a running server, which have no names."""

import os
from pathlib import Path

import psutil

from test.server.process import Server


def schedulers(server: Server) -> list[psutil.Process]:
    """The processes that compute, in the order of their tensor-parallel ranks."""
    found = {" ".join(process.cmdline()): process for process in server.family()}
    return [found[title] for title in sorted(found) if "sglang::scheduler" in title]


def host_file(process: psutil.Process, folder: Path) -> str:
    """Path by which a scheduler's file in ``folder`` can be opened."""
    links = Path(f"/proc/{process.pid}/fd")
    found = [link for link in links.iterdir() if os.readlink(link).startswith(f"{folder}/")]
    assert len(found) == 1, found
    return str(found[0])
