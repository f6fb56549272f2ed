"""``make demo``: every part in turn. With ``LIBRARY=dir`` the person's own folder takes the place of the generated one; it is only read."""

from __future__ import annotations

import os
import shutil

from tests.demo import library, pictures, sharing, training, weights
from tests.demo.stage import OUT


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    os.environ["HUBTOOL_LIBRARY"] = str(OUT / "library.sqlite3")
    library.show(os.environ.get("LIBRARY"))
    weights.show()
    pictures.show()
    trained = training.show()
    sharing.show(trained)
    print(f"\nEverything written lies in {OUT}/", flush=True)


if __name__ == "__main__":
    main()
