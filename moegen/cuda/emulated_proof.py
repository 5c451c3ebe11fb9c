"""`python -m moegen.cuda.emulated_proof`, in a process with an emulated driver: a job in, the report out, both JSON."""

from __future__ import annotations

import ctypes
import json
import sys

from .. import verification
from ..artifact import open_artifact


def main() -> None:
    """Reads a job from standard input and writes the report to standard output, both JSON."""
    job = json.load(sys.stdin)
    launches = ctypes.CDLL("libcuda.so.1").moegen_emulated_launches
    report = verification.verify(open_artifact(job["path"]), job["seed"], tokens=job["tokens"], also=job["also"], launches=launches)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
