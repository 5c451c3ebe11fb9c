"""`moegen` and `python -m moegen`."""

import sys

from .cli import main
from .own_processes import hide_torch

_WITHOUT_TORCH = ("build", "emit", "inspect", "list", "pack", "tune", "verify")


def run() -> None:
    """The command line; commands that have no use for torch do not wait for its import."""
    if len(sys.argv) > 1 and sys.argv[1] in _WITHOUT_TORCH:
        hide_torch()
    main()


if __name__ == "__main__":
    run()
