"""``python -m hubtool``: the same as the ``hubtool`` command."""

from __future__ import annotations

from hubtool.cli.main import main

if __name__ == "__main__":
    main()
