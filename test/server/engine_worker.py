"""``python engine_worker.py SOCKET OPTIONS``: one ``sgl.Engine`` that answers over a socket."""

import json
import sys
from multiprocessing.connection import Client


def main() -> None:
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[2]))
    with Client(sys.argv[1], family="AF_UNIX") as connection:
        while (arguments := connection.recv()) is not None:
            try:
                connection.send((True, engine.generate(**arguments)))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))
    engine.shutdown()


if __name__ == "__main__":
    main()
