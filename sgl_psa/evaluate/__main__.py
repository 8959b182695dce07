"""``python -m sgl_psa.evaluate``."""

from sgl_psa.evaluate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
