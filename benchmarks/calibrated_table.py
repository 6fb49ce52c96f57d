"""The README's short table of what calibration adds: python benchmarks/quality.py dit calibrated WORK first, then

    python benchmarks/calibrated_table.py

writes ``results/calibrated.md`` from ``results/quality/dit_calibrated.json`` (and the peers' list, where it has been run).
"""

from __future__ import annotations

import json

from common import RESULTS, markdown

COLUMNS = [
    ("name", "row", ""),
    ("bits", "stored bits", ".2f"),
    ("minutes", "quantize min", ".1f"),
    ("psnr", "PSNR dB", ".1f"),
    ("ssim", "SSIM", ".3f"),
    ("frechet", "Frechet, real", ".2f"),
    ("frechet_16bit", "Frechet, 16 bit", ".2f"),
    ("accuracy", "right class", ".2f"),
]
LISTS = ("dit_calibrated", "dit_low_bit_peers")


def table() -> str:
    """The table from the committed results, with what it was made from below.

    Raises:
        SystemExit: neither list of rows has been run.
    """
    runs = {name: json.loads(path.read_text()) for name in LISTS if (path := RESULTS / "quality" / f"{name}.json").is_file()}
    if not runs:
        raise SystemExit(
            f"{RESULTS / 'quality'} holds neither of {', '.join(LISTS)}: python benchmarks/quality.py dit calibrated WORK"
        )
    rows, seen = [], set()
    for results in runs.values():
        for row in results["rows"]:
            if row["name"] in seen or "failed" in row:
                continue
            seen.add(row["name"])
            scores = {key: value[0] for key, value in row["scores"].items() if value}
            seconds = row.get("quantize_seconds")
            rows.append(scores | {"name": row["name"], "bits": row["bits_per_weight"], "minutes": seconds and seconds / 60})
    rows.sort(key=lambda row: (-row["bits"], row.get("psnr", 99)))
    run = next(iter(runs.values()))["run"]
    about = f"{run['images']} images per row, PSNR and SSIM on {run['paired']} of them; every score with its interval: "
    links = ", ".join(f"[{name}](../benchmarks/results/quality/{name}.md)" for name in runs)
    return f"{markdown(rows, COLUMNS)}\n\n{about}{links}\n"


def main() -> None:
    (RESULTS / "calibrated.md").write_text(table())


if __name__ == "__main__":
    main()
