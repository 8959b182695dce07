"""``python start_probe.py ARGVS``: how far each command line of a JSON list gets.

Everything that ``python -m sglang.launch_server`` does before it starts processes, many times in
one process, because the imports take most of a start. Prints a JSON list of
``[outcome, message]``; the outcome is ``"ok"``, ``"exit N"`` or the name of the exception.
"""

import contextlib
import io
import json
import sys


def attempt(argv: list[str]) -> tuple[str, str]:
    from sglang.srt.server_args import prepare_server_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prepare_server_args(argv).check_server_args()
    except SystemExit as stop:
        return f"exit {stop.code}", said.getvalue()
    except Exception as error:
        return type(error).__name__, str(error)
    return "ok", ""


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    outcomes = [attempt(argv) for argv in json.loads(sys.argv[1])]
    print("\n" + json.dumps(outcomes))


if __name__ == "__main__":
    main()
