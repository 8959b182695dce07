"""``python -m sglang_psa.serve``: serve the embedded model with PSA and say when it is ready.

A thin parent of ``sglang.launch_server``: every option it does not know is passed on. It prints
the URL once the server answers, and stops the server and all its processes on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import resources
from types import FrameType

EXAMPLE = """\
PSA server ready: {url}
  try    curl -s {url}/generate -H 'Content-Type: application/json' \\
           -d '{{"text": "# blue harbor482915\\n? blue harbor", \
"sampling_params": {{"max_new_tokens": 4, "temperature": 0}}}}'
  stats  curl -s {url}/psa/stats
  stop   Ctrl-C"""
STOP_SECONDS = 20.0


def embedded_model() -> str:
    """Folder of the recall model that ships with the package."""
    return str(resources.files("sgl_psa") / "assets" / "recall")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the rest for ``sglang.launch_server``."""
    parser = argparse.ArgumentParser(prog="python -m sglang_psa.serve", description=__doc__)
    parser.add_argument("--model-path", default=embedded_model())
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    return parser.parse_known_args(argv)


def answers(url: str) -> bool:
    """Whether the server is up."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group: politely, then for certain."""
    for sig in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, sig) if sig == signal.SIGKILL else server.send_signal(sig)
            server.wait(timeout=STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def main(argv: list[str] | None = None) -> int:
    """Run until the server ends or is told to; returns its exit status, 0 after Ctrl-C."""
    options, rest = parse(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", options.model_path, "--attention-backend", "psa"]
    command += ["--host", options.host, "--port", str(options.port), *rest]
    server = subprocess.Popen(command, start_new_session=True)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_signal)
    url = f"http://{options.host}:{options.port}"
    try:
        while server.poll() is None and not answers(url):
            time.sleep(1)
        if server.poll() is None:
            print(EXAMPLE.format(url=url), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        print("stopping", flush=True)
        stop(server)
        return 0
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())
