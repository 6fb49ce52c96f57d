"""The pages of docs/results.md: each list of rows that ``quality.py`` has run, both bundled models side by side.

    python benchmarks/ladders.py [LIST ...]

writes ``results/ladder_<list>.md`` from ``results/quality/{dit,unet}_<list>.json``; then run update_readme.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, markdown

LISTS = ("headline", "aq", "aq_4bit", "aq_1.5bit", "vq", "vq_choices", "vq_ours")
LISTS += ("fp8", "fp8_rounding", "fp6", "fp4", "fp3", "fp_groups", "fp_inputs")
LISTS += ("svdquant", "svdquant_a8", "svdquant_more", "fp_and_svdquant", "peers", "low_bit_peers", "four_bit_peers")
MODELS = {"dit": "transformer", "unet": "UNet"}
SCORES = {
    "psnr": ("PSNR dB", ".1f"),
    "frechet": ("Fréchet, real", ".2f"),
    "frechet_16bit": ("16 bit", ".2f"),
    "accuracy": ("right class", ".3f"),
}


def main() -> None:
    for name in sys.argv[1:] or LISTS:
        if text := page(name):
            (RESULTS / f"ladder_{name}.md").write_text(text)


def page(name: str) -> str | None:
    """``results/ladder_<name>.md`` from the runs of that list; None if there is none."""
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := _results(model, name)).is_file()}
    return _table(name, found) + "\n" if found else None


def _results(model: str, name: str) -> Any:
    return RESULTS / "quality" / f"{model}_{name}.json"


def _table(name: str, found: dict[str, Any]) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for model, results in found.items():
        for row in results["rows"]:
            if "failed" in row:
                continue
            scores = {key: score[0] for key, score in row["scores"].items() if score and key in SCORES}
            scores["bits"] = row["bits_per_weight"]
            rows.setdefault(row["name"], {"name": row["name"]}).update({f"{model}_{key}": value for key, value in scores.items()})
    columns = [("name", "row", "")]
    for model in found:
        of = f"{MODELS[model]}: " if len(found) > 1 else ""
        columns.append((f"{model}_bits", f"{of}stored bits", ".2f"))
        columns += [(f"{model}_{key}", heading, spec) for key, (heading, spec) in SCORES.items()]
    return f"{markdown(list(rows.values()), columns)}\n\n{_about(name, found)}"


def _about(name: str, found: dict[str, Any]) -> str:
    run = next(iter(found.values()))["run"]
    links = " and ".join(f"[{MODELS[model]}](../benchmarks/results/quality/{model}_{name}.md)" for model in found)
    return f"{run['images']} images per row, {run['paired']} of them for PSNR. All scores with their intervals: {links}."


if __name__ == "__main__":
    main()
