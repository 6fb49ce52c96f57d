"""Spoiled checkpoints by the thousand: how each ends, how long the slowest takes, how much memory all of them add.

python benchmarks/fuzz.py [--examples 1000]

Every family runs in a process of its own that may not allocate more than a gigabyte beyond what the libraries take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
LIMIT = 1 << 30
FAMILIES = ("config", "header", "index", "single file", "encoder config", "encoder header", "encoder index")


def run_family(family: str, examples: int) -> list[dict[str, Any]]:
    """One row per door. Anything but a documented error counts as a failure; the first is kept."""
    sys.path.insert(0, str(TESTS))
    import fuzzing
    import torch
    from hypothesis import HealthCheck, Phase, given, seed, settings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, fuzzing.quiet_libraries():
        originals = fuzzing.Originals(Path(folder))
        strategy, doors = originals.families()[family]
        fuzzing.knock(doors[-1], originals.write(originals.good(family)))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT, taken + LIMIT))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = {door: Counter() for door in doors}
        slowest, failures = dict.fromkeys(doors, 0.0), {}

        @seed(0)
        @settings(
            max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        @given(strategy)
        def knock_at_all(files: dict[str, bytes]) -> None:
            spoiled = originals.write(files)
            for door in doors:
                start = time.perf_counter()
                try:
                    outcome = fuzzing.knock(door, spoiled)
                except BaseException as error:
                    outcome = "failed"
                    failures.setdefault(door, f"{type(error).__name__}: {error}"[:300])
                slowest[door] = max(slowest[door], time.perf_counter() - start)
                outcomes[door][outcome] += 1

        knock_at_all()
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [
        {"family": family, "door": door, "examples": sum(outcomes[door].values()), "failed": outcomes[door]["failed"]}
        | {name: outcomes[door][name] for name in fuzzing.OUTCOMES}
        | {"slowest_s": round(slowest[door], 3), "memory_mb": round(added, 1), "first_failure": failures.get(door)}
        for door in doors
    ]


COLUMNS = [
    ("family", "spoiled", ""),
    ("door", "read by", ""),
    ("examples", "examples", ""),
    ("refused by us", "refused by qdiff", ""),
    ("refused by the library", "refused by the loader", ""),
    ("loaded", "harmless, loaded", ""),
    ("failed", "failed", ""),
    ("slowest_s", "slowest s", ".2f"),
    ("memory_mb", "memory added MB", ".0f"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.family:
        print(json.dumps(run_family(arguments.family, arguments.examples)))
        return
    from common import write

    rows = []
    for family in FAMILIES:
        command = [sys.executable, __file__, "--family", family, "--examples", str(arguments.examples)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    write("fuzz", rows, COLUMNS, command=f"python benchmarks/fuzz.py --examples {arguments.examples}")
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
