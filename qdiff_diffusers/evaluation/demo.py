"""The demo: one small real model at many bit widths with the same seeds, and a picture, a page and a table of the results."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from rich.progress import Progress
from torch import Tensor

from ..checkpoint.folders import held
from ..checkpoint.inspect import inspect_checkpoint
from ..checkpoint.writing import write_text
from ..errors import ConfigError
from ..measuring.machine import machine_facts
from ..methods import METHODS
from .build import quiet_diffusers
from .classifier import classify, load_classifier
from .grid import GridRow, draw_grid, save_png
from .metrics import class_accuracy, feature_statistics, frechet_distance, load_statistics, psnr, ssim
from .report import DENSE_LABEL, Row, best_of_group, render_report
from .sampling import image_labels, image_seeds, num_steps, sample
from .subject import BUNDLED, class_names
from .workers import Reporter, run_jobs

DEMO_MODEL = BUNDLED["dit"]
STEPS, GUIDANCE = 20, 2.0
GRID_COLUMNS = 10


@dataclass(frozen=True)
class DemoConfig:
    """One quantized row: a method, its nominal ``bits``, and its other settings."""

    method: str
    bits: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{METHODS[self.method].label} {self.bits:g}-bit"


def _codebook(method: str, bits: float, **shape: int) -> DemoConfig:
    """A row with a shared codebook of a given shape that stores no more bits than round-to-nearest's codes and scales."""
    quick = {"effort": 0} if method == "aq" else {}  # a narrow beam: a quarter of the time, within a decibel
    return DemoConfig(method, bits, {"codebook": "shared"} | quick | shape)


# What the demo shows, in this order. Rows of equal bits form a group and stand together. Round-to-nearest in groups of 64 stores
# half a bit more than its name says, so the others may too: what counts is the column of stored bits.
DEMO_CONFIGS = (
    DemoConfig("rtn", 8),
    DemoConfig("fp", 8),
    DemoConfig("svdquant", 8),
    DemoConfig("vq", 8),
    DemoConfig("rtn", 4),
    DemoConfig("fp", 4),
    DemoConfig("svdquant", 4),
    _codebook("vq", 4, codebook_bits=13, vector_size=3),
    _codebook("aq", 4, num_codebooks=3, codebook_bits=10, vector_size=7),
    DemoConfig("rtn", 3),
    DemoConfig("fp", 3),
    DemoConfig("svdquant", 3),
    _codebook("vq", 3, codebook_bits=10, vector_size=3),
    _codebook("aq", 3, num_codebooks=2, codebook_bits=10, vector_size=6),
    DemoConfig("rtn", 2),
    DemoConfig("svdquant", 2),
    _codebook("vq", 2, codebook_bits=12, vector_size=5),
    _codebook("aq", 2, num_codebooks=3, codebook_bits=8, vector_size=10),
    DemoConfig("rtn", 1),
    DemoConfig("aq", 1.5),
)


@dataclass(frozen=True)
class Job:
    """One row to make: ``config`` is ``None`` for the 16-bit reference."""

    config: DemoConfig | None
    labels: list[int]
    seeds: list[int]
    device: str

    @property
    def name(self) -> str:
        return self.config.name if self.config else DENSE_LABEL


def run_demo(
    output_dir: str | Path,
    *,
    images: int,
    methods: Collection[str] | None = None,
    seed: int = 0,
    device: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize, save, reload and sample the demo model in every configuration of :data:`DEMO_CONFIGS`.

    Writes ``grid.png``, ``report.html`` and ``results.json`` into ``output_dir``.

    Args:
        images: number of images per row; they go through the classes in turn.
        methods: names of the methods to show, such as "rtn"; ``None`` for all in :data:`DEMO_CONFIGS`.
        seed: base seed of the images.
        device: device to compute on; by default "cuda" if there is one, else "cpu".
        workers: number of rows made at the same time, each by a process of one thread; 1 makes them here, one by one.
        progress: a running rich progress display to draw bars on.

    Returns:
        the content of ``results.json``: ``{"rows": [...], "run": {...}}``.

    Raises:
        ConfigError: a method is unknown, there are no images to make, or ``output_dir`` cannot be written.
    """
    shown = dict.fromkeys(config.method for config in DEMO_CONFIGS)
    if unknown := sorted(set(methods or ()) - set(shown)):
        raise ConfigError(f"unknown method {', '.join(unknown)}; the demo knows {', '.join(shown)}")
    if images < 1:
        raise ConfigError(f"images must be at least 1, got {images}")
    start = time.perf_counter()
    folder = Path(output_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    labels, seeds = image_labels(images, len(class_names(DEMO_MODEL))), image_seeds(images, seed)
    configs = [None, *(c for c in DEMO_CONFIGS if methods is None or c.method in methods)]
    with held(folder):
        jobs = [Job(config, labels, seeds, device) for config in configs]
        workers = min(workers, len(jobs))
        steps = len(jobs) * num_steps(images, steps=STEPS)
        rows, pictures = zip(*run_jobs(make_row, jobs, workers=workers, steps=steps, progress=progress), strict=True)
        pictures = [torch.from_numpy(picture) for picture in pictures]
        for row, quality in zip(rows, _qualities(pictures, labels), strict=True):
            row |= quality
        run = machine_facts(torch.device(device)) | {
            "workers": workers,
            "threads_per_worker": torch.get_num_threads() if workers == 1 else 1,
            "arithmetic": "float32",
            "images": images,
            "seeds": seeds,
            "steps": STEPS,
            "guidance_scale": GUIDANCE,
            "command": _command(images, methods, seed),
            "seconds": round(time.perf_counter() - start, 1),
        }
        results = {"rows": list(rows), "run": run}
        _write_outputs(folder, results, pictures)
    return results


def make_row(job: Job, reporter: Reporter) -> tuple[Row, np.ndarray]:
    """Make one row: its size and times, and its images ``[images, channels, height, width]`` in [0, 1]."""
    with quiet_diffusers():
        pipe, row = _load_quantized(job.config, reporter) if job.config else _load_reference(reporter)
        pipe.to(job.device)
        reporter.start(f"{job.name}: sampling", num_steps(len(job.seeds), steps=STEPS))
        start = time.perf_counter()
        images = sample(pipe, job.labels, job.seeds, steps=STEPS, guidance_scale=GUIDANCE, on_step=reporter.step)
    return row | {"seconds_per_image": round((time.perf_counter() - start) / len(images), 4)}, images.numpy()


def _load_reference(reporter: Reporter) -> tuple[Any, Row]:
    reporter.start(f"{DENSE_LABEL}: loading")
    pipe, load_seconds = _timed_load(DEMO_MODEL, dtype=torch.float32)
    return pipe, {
        "name": DENSE_LABEL,
        "method": "none",
        "nominal_bits": 16,
        "bits_per_weight": 16.0,
        "size_bytes": _stored_bytes(DEMO_MODEL),
        "load_seconds": round(load_seconds, 3),
        "reload_seconds": None,
    }


def _load_quantized(config: DemoConfig, reporter: Reporter) -> tuple[Any, Row]:
    """Quantize while loading, save, and load the saved model."""
    reporter.start(f"{config.name}: quantizing")
    settings = METHODS[config.method].config(bits=config.bits, **config.settings)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": settings})
    # float16 is what the model is stored in, so nothing is lost and all that is not quantized keeps its size.
    pipe, load_seconds = _timed_load(DEMO_MODEL, quantization_config=mapping, dtype=torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        bits, size = inspect_checkpoint(folder).bits_per_weight, _stored_bytes(Path(folder))
        pipe, reload_seconds = _timed_load(folder, dtype=torch.float32)
    return pipe, {
        "name": config.name,
        "method": config.method,
        "nominal_bits": config.bits,
        "bits_per_weight": round(bits, 4),
        "size_bytes": size,
        "load_seconds": round(load_seconds, 3),
        "reload_seconds": round(reload_seconds, 3),
    }


def _timed_load(folder: str | Path, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return DiffusionPipeline.from_pretrained(folder, **kwargs), time.perf_counter() - start


def _qualities(pictures: list[Tensor], labels: list[int]) -> Iterator[Row]:
    """Metrics of each row; PSNR and SSIM compare with the first row, and are ``None`` for that itself."""
    classifier = load_classifier(DEMO_MODEL / "classifier" / "model.safetensors")
    statistics = load_statistics(DEMO_MODEL / "classifier" / "statistics.npz")
    for i, images in enumerate(pictures):
        features, logits = classify(classifier, images)
        decibels = psnr(images, pictures[0]).mean().item()  # infinite for the reference itself
        yield {
            "psnr": round(decibels, 3) if math.isfinite(decibels) else None,
            "ssim": round(ssim(images, pictures[0]).mean().item(), 5) if i else None,
            "frechet": round(frechet_distance(feature_statistics(features), statistics), 4),
            "accuracy": round(class_accuracy(logits, labels), 4),
        }


def _write_outputs(folder: Path, results: dict[str, Any], pictures: list[Tensor]) -> None:
    rows, run = results["rows"], results["run"]
    columns = [name.partition("/")[0] for name in class_names(DEMO_MODEL)][: run["images"]]
    best = best_of_group(rows, "psnr")
    grid = [
        GridRow(
            name=row["name"],
            bits=f"{row['bits_per_weight']:.2f}",
            quality="" if row["psnr"] is None else f"{row['psnr']:.1f}",
            images=picture[:GRID_COLUMNS],
            opens_group=i > 0 and row["nominal_bits"] != rows[i - 1]["nominal_bits"],
            best=row["name"] in best,
        )
        for i, (row, picture) in enumerate(zip(rows, pictures, strict=True))
    ]
    title = "The same seeds at fewer bits"
    subtitle = "A diffusion transformer trained on Fashion-MNIST, quantized while loading. PSNR against the 16-bit model's images."
    save_png(draw_grid(grid, columns, title=title, subtitle=subtitle), folder / "grid.png")
    write_text(folder / "report.html", render_report(rows, run, (folder / "grid.png").read_bytes()))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


def _stored_bytes(pipeline_folder: Path) -> int:
    return sum(path.stat().st_size for path in (pipeline_folder / "transformer").glob("*.safetensors"))


def _command(images: int, methods: Collection[str] | None, seed: int) -> str:
    command = f"qdiff demo -o demo --images {images} --seed {seed}"
    return command + (f" --only {','.join(methods)}" if methods else "")
