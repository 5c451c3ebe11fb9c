"""`python -m moegen.field.prove FOLDER...`: the numerical proof of artifacts on the device, one line of JSON for each."""

from __future__ import annotations

import argparse
import json

from .. import verification
from ..artifact import open_artifact
from ..errors import MoegenError


def main() -> None:
    """Exit code 1 where a proof fails."""
    parser = argparse.ArgumentParser(prog="moegen.field.prove", description=__doc__)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--tokens", default=",".join(map(str, verification.TOKENS)))
    parser.add_argument("--routings", default=",".join(verification.ROUTINGS))
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args()
    failed = False
    for path in asked.artifacts:
        try:
            tokens = tuple(int(count) for count in asked.tokens.split(","))
            report = verification.verify(open_artifact(path), asked.seed, tokens=tokens, routings=asked.routings.split(","))
        except (MoegenError, RuntimeError, ValueError) as error:  # the device's own refusals are RuntimeErrors
            report = {
                "status": "failed",
                "failures": [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__],
            }
        report.pop("cases", None)
        failed |= report["status"] != "passed"
        print(json.dumps({"artifact": path} | report), flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
