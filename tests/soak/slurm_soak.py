"""Time-outs, preemptions and lost nodes at random moments of sweeps on a fake SLURM, and a comparison of bytes.

    python tests/soak/slurm_soak.py --times 5 --seed 0

Each time, a sweep of two jobs is run in which both are hit once, at a moment drawn evenly from the time that an
undisturbed job takes. Not a test of the fast suite; `tests/cluster/test_slurm.py` has each situation once.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster_sweeps import end, outcome, start
from slurm_sweeps import SITUATIONS, disturbed


def at_random(drawn: random.Random, job_s: float) -> Callable[[str], bool]:
    """Say of each job, after it began, when its moment has come."""
    times = defaultdict(lambda: time.monotonic() + drawn.uniform(0.2, 0.9) * job_s)
    return lambda job: time.monotonic() >= times[job]


def main() -> int:
    """Print a row a situation; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--situations", nargs="+", default=list(SITUATIONS), choices=SITUATIONS)
    arguments = parser.parse_args()
    top, drawn, failed = Path(tempfile.mkdtemp(prefix="slurm-soak-")), random.Random(arguments.seed), False
    try:
        begun = time.monotonic()
        end(start(top / "whole"))
        job_s, whole = (time.monotonic() - begun) / 2, outcome(top / "whole")
        print("| situation | sweeps | jobs hit | byte-identical |\n|---|---|---|---|", flush=True)
        for situation in arguments.situations:
            equal, hit = 0, 0
            for turn in range(arguments.times):
                folder = top / f"{situation}-{turn}"
                hit += disturbed(folder, situation, at_random(drawn, job_s), complete=False)[1]
                equal += outcome(folder) == whole
            print(f"| {situation} | {arguments.times} | {hit} | {equal} |", flush=True)
            failed |= equal != arguments.times
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
