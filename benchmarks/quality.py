"""The tables of quality: run a list of rows with ``qdiff eval`` and keep the result.

    python benchmarks/quality.py dit data_free WORK      # benchmarks/results/quality/dit_data_free.{json,md,png}
    python benchmarks/quality.py unet peers WORK --images 200

``WORK`` holds every row's images; run the same command again to go on after an interruption. Lists are in ``benchmarks/quality/``.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

from common import RESULTS

from qdiff_diffusers.cli import main as qdiff

LISTS = Path(__file__).parent / "quality"
KEPT = {"results.json": ".json", "table.md": ".md", "grid.png": ".png"}


def main() -> None:
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    model, rows, work, *more = sys.argv[1:]
    folder = Path(work) / f"{model}_{rows}"
    try:
        qdiff(["eval", model, "--rows", str(LISTS / f"{rows}.yaml"), "-o", str(folder), *more])
    except SystemExit as end:
        if end.code:
            raise
    target = RESULTS / "quality"
    target.mkdir(parents=True, exist_ok=True)
    for name, suffix in KEPT.items():
        shutil.copy(folder / name, target / f"{model}_{rows}{suffix}")
    path = target / f"{model}_{rows}.json"
    results = json.loads(path.read_text())
    results["run"]["command"] = shlex.join(["python", "benchmarks/quality.py", model, rows, "WORK", *more])
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
