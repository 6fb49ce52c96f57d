"""Everything that wants a GPU, on the day there is one, the most important first, in as many minutes as there are.

    python benchmarks/gpu.py --minutes 10                   # again with the same command: goes on where it stopped
    python benchmarks/gpu.py --device cpu --tiny -o /tmp/x  # the plumbing alone, in seconds

The stages: the compiled kernels against the float64 oracle; the tuner; single layers beside the installed peers; DiT-XL/2, slices
of FLUX and SDXL, eager and compiled, at 512 and 4096 tokens; speed and peak memory of quantizing; and the tables. Each gets a share
of the minutes, and what one leaves goes to those behind it. A stage is made of parts; gpu.json is written when a part ends, so an
interrupted run loses one part at the most, and the tools behind the parts keep theirs as well. gpu.md names what was skipped.

Results go to results/ (or ``-o``): gpu.{json,md}, layers_cuda.*, models_cuda.*; tuned tile sizes go to the kernels' configs/. Both
are to be committed. A run at another commit, or with other releases of torch, Triton or a peer, starts anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown

from qdiff_diffusers.bench import report, results

ROOT = Path(__file__).parents[1]
CHUNK = 40  # tests in a part
TESTS = ROOT / "kernels" / "tests" / "test_gpu.py"  # on a GPU they run compiled, against float64
MODELS = ("dit-xl-2", "flux-slice-4096", "flux-slice-512", "sdxl-slice-4096", "sdxl-slice-512")
LAYERS = ("3072x3072", "3072x12288", "12288x3072", "1152x1152", "1152x4608", "conv640@32", "conv1280@16")
QUANTIZED = ((3072, 3072), (12288, 3072))  # [out, in]
STAGES = {"correctness": 5, "tune": 5, "layers": 4, "models": 5, "quantize": 1}  # with their shares of the minutes
LEAST = 5.0  # seconds: with less left a part is not begun
UNFINISHED = 75  # exit code of a part that wants to be run again


@dataclass(frozen=True)
class Options:
    """What is run, and where."""

    device: str
    tiny: bool
    output: Path


@dataclass(frozen=True)
class Part:
    """A part of a stage: ``run(seconds)`` returns what to write down, with ``"unfinished"`` or ``"failure"`` to try again."""

    name: str
    run: Callable[[float], dict[str, Any]]


class State:
    """gpu.json: what has been done, by stage and part; nothing of a run whose ``machine`` was another."""

    def __init__(self, file: Path, machine: dict[str, Any]) -> None:
        self.file, self.machine = file, machine
        self.parts: dict[str, dict[str, dict[str, Any]]] = {stage: {} for stage in STAGES}
        self.changed: list[str] = []
        if file.is_file():
            stored = json.loads(file.read_text())
            self.changed = [name for name in machine if stored["machine"].get(name) != machine[name]]
            if not self.changed:
                self.parts |= stored["parts"]

    def done(self, stage: str, part: str) -> bool:
        found = self.parts[stage].get(part)
        return found is not None and not found.get("unfinished") and "failure" not in found

    def add(self, stage: str, part: str, found: dict[str, Any]) -> None:
        """Write a part down, at once."""
        self.parts[stage][part] = found
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")
        beside.replace(self.file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few small parts of every stage, to try the command")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, of {', '.join(STAGES)}")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--bench", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bench:
        bench(arguments.bench)
        return
    chosen = [stage for stage in STAGES if stage in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if not arguments.minutes > 0:
        parser.error(f"minutes must be a positive number, got {arguments.minutes:g}")
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu.py needs a GPU, and torch sees none here; --device cpu --tiny tries the command without one", file=sys.stderr)
        raise SystemExit(2)
    options = Options(device, arguments.tiny, arguments.output.resolve())
    deadline = time.monotonic() + 60 * arguments.minutes
    state = State(options.output / "gpu.json", machine(device))
    if state.changed:
        print(f"{state.file} is of another {', '.join(state.changed)}: starting anew", file=sys.stderr)
    parts = {stage: list(PARTS[stage](options)) for stage in chosen}
    run_stages(parts, options, state, deadline)
    text = page(parts, state, options)
    (options.output / "gpu.md").write_text(text)
    print(text)


def machine(device: str) -> dict[str, Any]:
    """What results depend on: the facts by which ``qdiff bench`` decides whether to go on, and Triton's release."""
    found = results.facts(torch.device(device), torch.bfloat16, 0)
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return {name: value for name, value in found.items() if name not in results.INCIDENTAL} | {"triton": triton}


def run_stages(parts: dict[str, list[Part]], options: Options, state: State, deadline: float) -> None:
    """Every stage in turn, each with its share of what is left."""
    shares = sum(STAGES[stage] for stage in parts)
    for stage, own in parts.items():
        ends = time.monotonic() + (deadline - time.monotonic()) * STAGES[stage] / shares
        shares -= STAGES[stage]
        for part in own:
            seconds = ends - time.monotonic()
            if state.done(stage, part.name) or (seconds < LEAST and not options.tiny):
                continue
            print(f"{stage}: {part.name}", flush=True)
            start = time.monotonic()
            try:
                found = part.run(seconds)
            except Exception as error:  # the parts behind it may still run
                found = {"failure": f"{type(error).__name__}: {error}"}
            state.add(stage, part.name, found | {"seconds": round(time.monotonic() - start, 1)})


def correctness(options: Options) -> Iterator[Part]:
    """The kernels' tests in chunks."""
    tests = f"{TESTS}::test_columns_split_over_programs_add_up_to_the_same" if options.tiny else str(TESTS)
    listed = child([sys.executable, "-m", "pytest", "--collect-only", tests], options, 120)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        raise SystemExit(f"pytest finds no tests of the kernels: {listed.stdout[-500:]}{listed.stderr[-500:]}")
    size = 2 if options.tiny else CHUNK
    workers = ["-n", "auto", "--maxprocesses", "16"] if importlib.util.find_spec("xdist") and not options.tiny else []
    for first in range(0, len(names), size):
        chunk = names[first : first + size]

        def run(seconds: float, chunk: list[str] = chunk) -> dict[str, Any]:
            ran = child([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *chunk], options, seconds)
            if ran.returncode == UNFINISHED:
                return {"unfinished": True}
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.M)
            return {"tests": len(chunk), "failed": failed} | ({} if failed else failure(ran))

        yield Part(f"{first + 1} to {first + len(chunk)} of {len(names)}", run)


def tune(options: Options) -> Iterator[Part]:
    """The tuner goes on by itself where it stopped."""

    def run(seconds: float) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "kernels" / "tune.py"), "--device", options.device]
        if options.tiny:
            command += ["--only", "integer8 row int8", "--tokens", "1", "--shapes", "16x64"]
            command += ["--output", str(options.output / "configs")]
        else:
            command += ["--budget", str(max(1.0, seconds - LEAST))]
        ran = child(command, options, seconds)
        tuned = sum("x bf16" in line for line in ran.stdout.splitlines())
        unfinished = ran.returncode == UNFINISHED or "time is up" in ran.stdout
        return {"tuned": tuned, "unfinished": unfinished} | failure(ran)

    yield Part("tile sizes", run)


def layers(options: Options) -> Iterator[Part]:
    """One part for each shape."""
    wanted = ["--tokens", "1,2,16,64,256,1024,4096", "--budget", "0.1"]
    if options.tiny:
        wanted = ["--tokens", "1,16", "--budget", "0.001", "--only", "qdiff-int4"]
    for shape in ("64x32",) if options.tiny else LAYERS:
        yield bench_part(shape, ["layers", "--shapes", shape, *wanted], options)


def models(options: Options) -> Iterator[Part]:
    """One part for each model, eager and compiled."""
    wanted = ["--compiled", "--budget", "1"]
    if options.tiny:
        wanted = ["--budget", "0.001", "--only", "qdiff-int4"]
    for model in ("tiny",) if options.tiny else MODELS:
        yield bench_part(model, ["models", "--model", model, *wanted], options)


def bench_part(name: str, command: list[str], options: Options) -> Part:
    """A part that ``qdiff bench`` measures; it writes after every few cells and resumes by itself."""

    def run(seconds: float) -> dict[str, Any]:
        place = ["--device", options.device, "--resume", "--output", str(options.output)]
        ran = child([sys.executable, __file__, "--bench", *command, *place], options, seconds)
        return {"unfinished": ran.returncode == UNFINISHED} | failure(ran)

    return Part(name, run)


def bench(command: list[str]) -> None:
    """``qdiff bench`` with one more model."""
    from qdiff_diffusers.bench.models import MODELS as KNOWN
    from qdiff_diffusers.bench.models import Model, _dit_inputs
    from qdiff_diffusers.cli import main as qdiff

    KNOWN["tiny"] = Model(_tiny_dit, _dit_inputs, "a DiT of one block, 64 wide")
    qdiff(["bench", *command])


def _tiny_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=32, num_embeds_ada_norm=1000)


def quantize(options: Options) -> Iterator[Part]:
    """Seconds and peak memory of one layer of each of FLUX's frequent shapes, with every config of quantize_12b.py."""
    import quantize_12b

    configs = list(quantize_12b.CONFIGS)
    for shape in ((64, 64),) if options.tiny else QUANTIZED:
        for config in configs[:1] if options.tiny else configs:

            def run(seconds: float, config: str = config, shape: tuple[int, int] = shape) -> dict[str, Any]:
                found = quantize_12b.measure(config, shape, options.device)
                return {"layer_seconds": found["seconds"], "peak_bytes": found["peak"], "bits": found["bits"]}

            yield Part(f"{config}, {shape[0]}x{shape[1]}", run)


PARTS: dict[str, Callable[[Options], Iterator[Part]]] = {
    "correctness": correctness,
    "tune": tune,
    "layers": layers,
    "models": models,
    "quantize": quantize,
}


def child(command: list[str], options: Options, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command for so many seconds at the most; one that is stopped has ``UNFINISHED`` as its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if options.device == "cpu" and "--bench" not in command:  # what is timed runs on the CPU's own kernels
        environment["TRITON_INTERPRET"] = "1"
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=None if options.tiny else max(seconds, 1)
        )
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        return subprocess.CompletedProcess(command, UNFINISHED, said, "")


def failure(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a command that failed said last."""
    return {} if ran.returncode in (0, UNFINISHED) else {"failure": (ran.stderr.strip() or ran.stdout.strip())[-1000:]}


def page(parts: dict[str, list[Part]], state: State, options: Options) -> str:
    """gpu.md: what ran, what failed, what was skipped, and the tables."""
    rows, notes = [], []
    for stage, wanted in parts.items():
        found = state.parts[stage]
        done = sum(state.done(stage, part.name) for part in wanted)
        rows.append({"stage": stage, "done": done, "of": len(wanted), "seconds": sum(part["seconds"] for part in found.values())})
        failed = [f"{name}: {part['failure'].splitlines()[-1]}" for name, part in found.items() if part.get("failure")]
        failed += [test for part in found.values() for test in part.get("failed", ())]
        kinds = {
            "skipped for want of time": [part.name for part in wanted if part.name not in found],
            "unfinished": [name for name, part in found.items() if part.get("unfinished")],
            "failed": failed,
        }
        notes += [f"- {stage}, {what}: {'; '.join(names)}" for what, names in kinds.items() if names]
    checked = state.parts["correctness"].values()
    tests, broken = sum(part.get("tests", 0) for part in checked), sum(len(part.get("failed", ())) for part in checked)
    quantized = [{"part": name} | part for name, part in state.parts["quantize"].items()]
    columns = (("part", "quantizing a layer", ""), ("layer_seconds", "seconds", ".2f"), ("peak_bytes", "peak bytes", ".3g"))
    where = ", ".join(f"{name} {state.machine.get(name)}" for name in ("gpu", "torch", "triton", "commit"))
    sections = [
        "# A try without a GPU: no number here means anything" if options.device == "cpu" else "# Measured on a GPU",
        f"Made by `python benchmarks/gpu.py`; {where}.",
        markdown(rows, (("stage", "stage", ""), ("done", "parts done", ""), ("of", "of", ""), ("seconds", "seconds", ".0f"))),
        f"{tests - broken} of {tests} tests of the kernels passed.",
        "\n".join(notes),
        markdown(quantized, columns) if quantized else "",
        *tables(options),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def tables(options: Options) -> Iterator[str]:
    """The tables of layers and models, as far as they were measured: a part that was stopped has left its cells."""
    for name, table in (("layers", report.layers_markdown), ("models", report.models_markdown)):
        path = options.output / f"{name}_{torch.device(options.device).type}"
        file = path.with_name(path.name + ".json")
        if file.is_file():
            measured = results.Results(path, json.loads(file.read_text())["facts"], resume=True)
            text = table(measured)
            path.with_name(path.name + ".md").write_text(text)
            yield f"## {name}\n\n{text.strip()}"


if __name__ == "__main__":
    main()
