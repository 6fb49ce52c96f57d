"""Runs a quick part of the tests with the oldest and the newest versions of what the package stands on: docs/versions.md.

python scripts/versions.py [ROW ...]            every row by default; rows that are not run keep their earlier outcome
python scripts/versions.py --failed [ROW ...]   only what failed before in those rows

Needs the package index and, one torch at a time, about 8 GB of disk (CUDA builds come with their libraries). Each torch gets one
environment under .venv-versions, made for its rows and deleted after the last of them; QDIFF_KEEP=1 leaves it there. PYTHON names
another interpreter than the one that runs this.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = ROOT / ".venv-versions"
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "numba",
)

# What pyproject.toml allows at least.
OLDEST = {
    "diffusers": "==0.40.0",
    "transformers": "==5.0.0",
    "huggingface-hub": "==1.23.0",
    "peft": "==0.18.0",  # 0.17 does not import with transformers 5
    "accelerate": "==1.0.0",
    "safetensors": "==0.8.0",
    "numpy": "==1.26.0",
    "filelock": "==3.13.0",
    "jinja2": "==3.1.0",
    "packaging": "==23.0",
    "pillow": "==10.1.0",
    "pyyaml": "==6.0.1",
    "rich": "==13.0.0",
    "typer": "==0.12.0",
    "matplotlib": "==3.8.0",
    "numba": "==0.62.0",
    "llvmlite": "==0.45.0",
}
NEWEST = dict.fromkeys(OLDEST, "")
BEFORE_HUB_2 = {"huggingface-hub": "<2"}
OLD_TRITON_NUMPY = {"numpy": "<2.4"}  # Triton's interpreter before 3.7 cannot work with numpy 2.4

HEADER = """# Versions

The oldest versions that `pyproject.toml` allows, the newest, and some between, each with a part of the tests: round trips, layers,
pipelines, text encoders, LoRA, loading with nothing imported, single files, compiling, uploads, and the kernels against their
reference (without a GPU under Triton's interpreter). Made by `python scripts/versions.py`, whose `TESTS` say what runs;
`benchmarks/results/versions.json` counts it by file.
"""


class Row(NamedTuple):
    """One line of the table: a torch, what is installed beside it, and the parts of ``TESTS`` that concern it."""

    about: str
    torch: str
    packages: dict[str, str]
    parts: tuple[str, ...] = ("tests/", "kernels/")


OLD_DIFFUSERS = {"diffusers": OLDEST["diffusers"]} | BEFORE_HUB_2
OLD_TRANSFORMERS = {"transformers": OLDEST["transformers"]} | BEFORE_HUB_2
OLD_PEFT = {name: OLDEST[name] for name in ("peft", "accelerate")}
OLD_TRITON = {"triton": "==3.4.0"} | OLD_TRITON_NUMPY
TEXT = ("tests/test_text", "tests/test_embeddings", "tests/test_pipelines", "tests/test_autoload", "tests/integrations/")
ADAPTERS = ("tests/test_lora", "tests/test_layers", "tests/test_compile", "tests/integrations/")
GPU = ("kernels/tests/test_gpu",)
ROWS = {
    "oldest": Row("the oldest of everything", "torch==2.6.0", OLDEST),
    "torch-2.11": Row("torch 2.11, triton 3.6, huggingface_hub 1.x", "torch==2.11.0", NEWEST | BEFORE_HUB_2 | OLD_TRITON_NUMPY),
    "diffusers": Row("the oldest diffusers", "torch==2.13.0", NEWEST | OLD_DIFFUSERS, ("tests/",)),
    "transformers": Row("the oldest transformers", "torch==2.13.0", NEWEST | OLD_TRANSFORMERS, TEXT),
    "peft": Row("the oldest peft and accelerate", "torch==2.13.0", NEWEST | OLD_PEFT, ADAPTERS),
    "triton": Row("the oldest triton", "torch==2.13.0", NEWEST | OLD_TRITON, GPU),
    "newest": Row("the newest of everything", "torch", NEWEST | {"triton": "", "kernels": ""}),
}
FIVE = "aq-2-fp8 or vq-2-int8 or fp-nvfp4 or svdquant-4-int4 or rtn-4-int8"
# What pytest's -k selects in each file: whatever rests on a library's version, once per method.
TESTS = {
    "tests/test_round_trip.py": f"survives and dit and float32 and ({FIVE}) or sharded and flux and rtn or variant or copied",
    "tests/test_text_encoders.py": "survives and rtn or cast",
    "tests/test_embeddings.py": "survives and t5",
    "tests/test_pipelines.py": "different_methods or one_config or damaged or quant_mapping and svdquant",
    "tests/test_single_file.py": "rtn or refused or layout",
    "tests/test_lora.py": "saved_with or one_after or flux or trained",
    "tests/test_autoload.py": "nothing_imported or entry_point or broken",
    "tests/test_layers.py": "computes or rebuilt or dequantizing",
    "tests/integrations/test_patches.py": "exist",
    "tests/integrations/test_loading_in_threads.py": "several_threads",
    "tests/test_compile_and_gradients.py": "one_graph or gradients_to and dit or group_offloading and leaf",
    "tests/test_evaluation.py": "plot or grid",
    "tests/hub/test_push.py": "three_lines or fresh_process or push_to_hub",
    "kernels/tests/test_linear.py": "definition and plain or leading and int8",
    "kernels/tests/test_bitpack.py": "",
    "kernels/tests/test_cpu.py": "compiled_on or definition_on and low_rank+smooth+rotation+int8 and (int4-g64 or e2m1-g16 or 2x8)",
    "kernels/tests/test_project.py": "beside or client",
    "kernels/tests/test_gpu.py": "any_number or definition and int8 and rotation",
}


def sh(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, its output captured."""
    return subprocess.run([str(part) for part in command], text=True, capture_output=True, cwd=ROOT, **options)


def make_environment(row: Row) -> tuple[Path, str]:
    """The environment's interpreter, and why it could not be made ("" if it could)."""
    folder = ENVIRONMENTS / row.torch.replace("==", "-")
    python = folder / "bin" / "python"
    if not python.is_file():
        sh(os.environ.get("PYTHON", sys.executable), "-m", "venv", folder, check=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    present = sh(python, "-c", "import importlib.metadata as m; print(m.version('torch'))")
    steps = [] if present.returncode == 0 else [[*pip, row.torch]]
    torch = f"torch=={present.stdout.strip()}" if not steps else row.torch
    wanted = [f"{name}{version}" for name, version in row.packages.items()]
    steps += [
        [*pip, "--upgrade", torch, *wanted, "pytest>=8", "hypothesis>=6.100", "psutil"],
        [*pip, "--no-deps", "--editable", ROOT],
    ]
    for step in steps:
        done = sh(*step)
        if done.returncode:
            return python, done.stderr.strip().splitlines()[-1]
    return python, ""


def selection(parts: tuple[str, ...]) -> list[str]:
    """The files of ``TESTS`` that a row concerns, and one -k for all of them: pytest's arguments."""
    files = {path: chosen for path, chosen in TESTS.items() if path.startswith(parts)}
    terms = [f"({Path(path).name} and ({chosen}))" if chosen else f"({Path(path).name})" for path, chosen in files.items()]
    return [*files, "-k", " or ".join(terms)]


def run_tests(python: Path, *chosen: str) -> dict[str, Any]:
    """Counts by outcome, tests that passed by file, and what failed or was skipped, with the reason."""
    command = (python, "-m", "pytest", *chosen, "-p", "no:cacheprovider", "-rpfEs")
    done = sh(*command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])
    counts = {outcome.rstrip("s"): int(number) for number, outcome in found} or {"failed": 1}
    passed = Counter(match[1] for line in lines if (match := re.match(r"PASSED (\S+?)::", line)))
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))] or ([] if found else [lines[-1]])
    print(f"  {lines[-1].strip('= ')}", flush=True)
    return {
        "counts": counts,
        "passed": dict(passed),
        "failures": failures,
        "skipped": [line.removeprefix("SKIPPED ")[:300] for line in lines if line.startswith("SKIPPED")],
    }


def installed(python: Path) -> dict[str, str]:
    """Versions of ``PACKAGES`` in an environment, and Python's."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        f"names = {PACKAGES!r}\n"
        "have = {d.metadata['Name'].lower().replace('-', '_') for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {n: m.version(n) if n in have else '-' for n in names}))"
    )
    return json.loads(sh(python, "-c", code, check=True).stdout)


def run_row(name: str, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Install, test, describe. Of an ``earlier`` outcome only what failed is run again."""
    row, start = ROWS[name], time.monotonic()
    print(f"{name}: {row.about}", flush=True)
    python, problem = make_environment(row)
    if problem:
        return {"about": row.about, "problem": problem, "date": date.today().isoformat()}
    seconds = time.monotonic() - start
    return {
        "about": row.about,
        "versions": installed(python),
        **(mended(earlier, python) if earlier else run_tests(python, *selection(row.parts))),
        "install_s": round(seconds),
        "test_s": round(time.monotonic() - start - seconds),
        "date": date.today().isoformat(),
    }


def mended(earlier: dict[str, Any], python: Path) -> dict[str, Any]:
    """An earlier outcome after what failed then was run again."""
    again = run_tests(python, *(line.split()[1] for line in earlier["failures"]))
    counts = Counter(earlier["counts"]) - Counter({"failed": len(earlier["failures"])}) + Counter(again["counts"])
    passed = Counter(earlier["passed"]) + Counter(again["passed"])
    return {
        "counts": dict(counts),
        "passed": dict(passed),
        "failures": again["failures"],
        "skipped": [*earlier["skipped"], *again["skipped"]],
    }


def render(rows: dict[str, Any]) -> str:
    columns = ("python", *PACKAGES)
    lines = ["| | " + " | ".join(columns) + " | passed | skipped | failed |", "|---" * (len(columns) + 4) + "|"]
    notes = []
    for name, planned in ROWS.items():
        row = rows.get(name, {"about": planned.about, "problem": "not run yet"})
        versions, counts = row.get("versions", {}), row.get("counts", {})
        failed = counts.get("failed", 0) + counts.get("error", 0) if counts else "not run"
        cells = [versions.get(column, "") for column in columns]
        lines.append(
            f"| {' | '.join(map(str, [row['about'], *cells, counts.get('passed', 0), counts.get('skipped', 0), failed]))} |"
        )
        told = [
            row.get("problem"),
            *row.get("failures", []),
            *(f"skipped {line}" for line in row.get("skipped", ())),
        ]
        notes += [f"- {row['about']}: {note}" for note in told if note]
    body = "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")
    return f"{HEADER}\n{body}\n"


def main(names: list[str]) -> int:
    only_failed = "--failed" in names
    names = [name for name in names if name != "--failed"]
    if unknown := sorted(set(names) - set(ROWS)):
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    wanted = [name for name in ROWS if name in names or not names]
    if only_failed:
        wanted = [name for name in wanted if record.get(name, {}).get("failures")]
    for position, name in enumerate(wanted):
        found = run_row(name, record[name] if only_failed else None)
        record = {key: found if key == name else record[key] for key in ROWS if key in record or key == name}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(render(record))
        last = all(ROWS[later].torch != ROWS[name].torch for later in wanted[position + 1 :])
        if last and not os.environ.get("QDIFF_KEEP"):
            shutil.rmtree(ENVIRONMENTS / ROWS[name].torch.replace("==", "-"), ignore_errors=True)
    return any(row.get("problem") or row.get("failures") for row in record.values())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
