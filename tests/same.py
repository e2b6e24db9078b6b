"""Compare two runs of one recipe: the proof that a change moved no number.

    python tests/same.py RUN_BEFORE RUN_AFTER

It compares fingerprints, outputs byte for byte, metrics row for row, results and ledgers; it
leaves out what time, host or memory determine. Exit code 0: equal; 1: they differ, and the first
difference is named.
"""

import json
import sys
from pathlib import Path

from running import assert_same


def main(before, after):
    """Print what was compared; return the exit code."""
    stages, others = (
        json.loads((Path(run) / "run.json").read_text())["fingerprints"] for run in (before, after)
    )
    try:
        assert stages == others, "fingerprints in run.json"
        assert_same(before, after, stages)
    except AssertionError as difference:
        print(f"different: {str(difference).partition(chr(10))[0] or 'a ledger or a result'}")
        return 1
    print(f"equal: {len(stages)} stages")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
