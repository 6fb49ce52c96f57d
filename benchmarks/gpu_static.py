"""The static roofline of the GPU kernels: what they compile to, and how fast a model predicts them to be. No GPU is needed.

    python benchmarks/gpu_static.py                            # 9.0 whole, what each method does unasked on the other targets
    python benchmarks/gpu_static.py --only "fp 4" --targets 9.0,8.9 --tokens 16,4096    # look at some; nothing is written
    python benchmarks/gpu_static.py --check                    # a representative part against its budgets, in about a minute
    python benchmarks/gpu_static.py --write-budgets            # the whole; ceilings go down to today's numbers

Writes results/gpu_static.{json,md}; the page shows results/gpu_static_before.json beside them, which ``--before`` writes. Compiled
kernels are kept in ~/.cache/qdiff/gpu_static: a run that was stopped goes on where it was, and one after a small change is quick.
What the model assumes stands in kernels/tests/roofline/devices.py and model.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does unasked, without its warning

import torch
import triton
from gpu_static_page import BEFORE, NOW, budgets, load, page_of, write
from roofline.cases import KINDS, TOKENS, Case, cases
from roofline.compiled import CACHE, Library
from roofline.devices import DEVICES
from roofline.table import Row, merge, rows_of

from qdiff_diffusers.cli.console import progress_bars

WHOLE = "9.0"  # the target of which every layer is compiled unasked
# One of each way in which a layer runs: (target, layer, activations, tokens).
REPRESENTATIVE = (
    ("9.0", "aq 2", "none", 16),
    ("9.0", "vq 2", "int8", 256),
    ("9.0", "fp 4", "none", 16),
    ("9.0", "fp nvfp4", "none", 256),
    ("9.0", "fp e4m3 row", "fp8", 4096),
    ("9.0", "svdquant 4 g32 r24", "int4", 256),
    ("9.0", "rtn 8 row", "int8", 4096),
    ("8.9", "rtn 8", "none", 256),
    ("8.0", "fp 4", "fp8", 256),
)


def main() -> None:
    options = parse()
    library = Library(options.cache, options.workers)
    if options.check:
        check(library)
        return
    filtered = bool(options.only or options.targets or options.kinds or options.tokens)
    if filtered and (options.write_budgets or options.before):
        raise SystemExit("--write-budgets and --before take the whole table; leave out --only, --targets, --kinds and --tokens")
    rows, kernels = predict(wanted(options), library)
    if filtered:
        for target in dict.fromkeys(row["target"] for row in rows):
            print(page_of(target, rows, kernels, load(BEFORE)["rows"]))
        return
    if options.write_budgets:
        write_budgets(rows, kernels, options.accept_worse)
    write(BEFORE if options.before else NOW, rows, kernels)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=_words, help=f"of {', '.join(DEVICES)}")
    parser.add_argument("--only", default="", help="part of a layer's name, as the table shows it")
    parser.add_argument("--kinds", type=_words, help=f"activations, of {', '.join(KINDS)}")
    parser.add_argument("--tokens", type=_words, help=f"by themselves {', '.join(map(str, TOKENS))}")
    parser.add_argument("--all", action="store_true", help="every layer on every target: an hour or so")
    parser.add_argument("--before", action="store_true", help="write what later runs are shown beside")
    parser.add_argument("--check", action="store_true", help="compare a representative part with its budgets")
    parser.add_argument("--write-budgets", action="store_true", help="lower the ceilings to what was found")
    parser.add_argument("--accept-worse", action="store_true", help="with --write-budgets: raise some, too")
    parser.add_argument("--workers", type=int, help="processes that compile; as many as there are cores")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    if unknown := set(options.targets or ()) - set(DEVICES):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose from {', '.join(DEVICES)}")
    if unknown := set(options.kinds or ()) - set(KINDS):
        parser.error(f"unknown activations {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    if any(not word.isdigit() or not int(word) for word in options.tokens or ()):
        parser.error(f"tokens must be positive whole numbers, got {','.join(options.tokens)}")
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def wanted(options: argparse.Namespace) -> list[tuple[str, list[Case]]]:
    """Cases by target."""
    kinds, tokens = tuple(options.kinds or KINDS), tuple(map(int, options.tokens or TOKENS))
    found = []
    for target in options.targets or sorted(DEVICES, key=lambda name: (name != WHOLE, float(name))):
        whole = options.all or options.only or target == WHOLE
        chosen = list(cases(options.only, kinds, tokens, headlines=not whole))
        if not chosen:
            names = dict.fromkeys(case.layer.name for case in cases())
            raise SystemExit(f"no layer's name has {options.only!r} in it; they are {', '.join(names)}")
        found.append((target, chosen))
    return found


def predict(chosen: Sequence[tuple[str, list[Case]]], library: Library) -> tuple[list[Row], dict[str, Any]]:
    """Rows and kernels of all targets, with a bar that counts compiled kernels."""
    rows: list[Row] = []
    kernels: dict[str, Any] = {}
    with progress_bars() as bars:
        for target, found in chosen:
            task = bars.add_task(target, total=None)

            def advance(name: str, done: int, total: int, task: Any = task, target: str = target) -> None:
                bars.update(task, completed=done, total=total, description=f"{target} {name.strip('_')}")

            more, new = rows_of(DEVICES[target], found, library, advance)
            bars.update(task, total=1, completed=1, description=target)
            rows, kernels = merge(rows, more), kernels | new
    return rows, kernels


def check(library: Library) -> None:
    """Exit with 1 and a line for each kernel that exceeds its budget."""
    chosen: dict[str, list[Case]] = {}
    for target, name, kind, tokens in REPRESENTATIVE:
        found = [c for c in cases(name, (kind,), (tokens,)) if c.layer.name == name and c.shape == budgets.SHAPE]
        if not found:
            raise SystemExit(f"REPRESENTATIVE names a layer that no method makes: {name} with {kind} activations")
        chosen.setdefault(target, []).extend(found)
    rows, kernels = predict(list(chosen.items()), library)
    broken = [f"{row['layer']} on {row['target']}: {row['failure']}" for row in rows if "failure" in row]
    findings = list(budgets.findings(rows, kernels))
    broken += budgets.violations(findings, budgets.load(), triton.__version__)
    print("\n".join(broken) or f"{len({f.key for f in findings})} kernels are within their budgets")
    raise SystemExit(1 if broken else 0)


def write_budgets(rows: list[Row], kernels: dict[str, Any], accept_worse: bool) -> None:
    try:
        updated = budgets.updated(budgets.findings(rows, kernels), budgets.load(), triton.__version__, accept_worse)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    budgets.write(updated)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
