"""Quality of many quantized versions of one pipeline: the same seeds for all, scores, pictures and one page.

Every row has a folder of its own in the output folder, with its images and measurements. A run that was interrupted, or is repeated
with more images or more rows, continues from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..checkpoint.folders import held
from ..errors import ConfigError, QDiffError
from ..measuring.contenders import describe_failure
from ..measuring.machine import commit, machine_facts
from .build import Costs, build
from .outputs import write_outputs
from .probes import Probes, layer_errors, record, step_errors
from .rows import REFERENCE, EvalRow
from .sampling import image_seeds, num_steps, sample
from .scores import Scorer
from .store import MODEL, PROBES, ROWS, RowStore, digest
from .subject import Subject
from .workers import Reporter, run_jobs

VERSION = 1  # version of a row's folder; a new number makes all rows anew
SCORES_VERSION = 2  # version of the scores' definition; a new number makes stored images be scored again
PART = 500  # images after which a row's work is on disk
PROBE_IMAGES = 8
DEFAULT_STEPS = 50  # denoising steps that the progress bar expects where the pipeline chooses their number


@dataclass(frozen=True)
class Settings:
    """Number of images, and how they are drawn.

    Attributes:
        images: images per row, for the scores of sets: Frechet distance, precision and recall, accuracy.
        paired: how many of the images, from the first, are compared with the 16-bit model's one by one.
        seed: base seed of the images.
        batch_size: images per call of the pipeline.
        dtype: dtype of the arithmetic and of everything that is not quantized.
        rest_dtype: dtype for the images beyond the paired ones, whose scores do not need 32 bits; ``None`` for ``dtype``.
        device: device that everything runs on.
        keep_models: keep the quantized models; a calibrated model is always kept.
    """

    images: int = 200
    paired: int = 64
    seed: int = 0
    batch_size: int = 50
    dtype: str = "float32"
    rest_dtype: str | None = None
    device: str = "cpu"
    keep_models: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "paired", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def parts(self, have: int) -> Iterator[tuple[int, int, str]]:
        """The images still to draw when ``have`` exist: first, last and dtype of each part that is stored in one file."""
        length = -(-PART // self.batch_size) * self.batch_size
        while have < self.images:
            compared = have < self.paired or self.rest_dtype is None
            end = self.paired if compared and self.rest_dtype else self.images
            last = min(have + length, end, self.images)
            yield have, last, self.dtype if compared else str(self.rest_dtype)
            have = last


@dataclass(frozen=True)
class Job:
    """One row to make."""

    row: EvalRow
    subject: Subject
    settings: Settings
    root: Path

    @property
    def store(self) -> RowStore:
        """The row's folder, whose name depends on everything that its images depend on, except their number."""
        subject, settings = self.subject, self.settings
        definition = {"version": VERSION, "row": self.row.definition(), "model": subject.fingerprint, "labels": subject.labels}
        definition |= {"steps": subject.steps, "guidance_scale": subject.guidance_scale, "arguments": subject.arguments}
        definition |= {"seed": settings.seed, "dtype": settings.dtype, "device": settings.device.partition(":")[0]}
        if settings.rest_dtype:
            definition |= {"rest_dtype": settings.rest_dtype, "paired": settings.paired}
        return RowStore(self.root / ROWS, self.row.name, definition)

    def reference(self) -> Job:
        """The job that makes the 16-bit model's row."""
        return Job(REFERENCE, self.subject, self.settings, self.root)

    def score_key(self) -> str:
        """Key that depends on everything that the scores depend on besides the row's images."""
        scored_by = [SCORES_VERSION, self.subject.classifier_fingerprint]
        return digest([*scored_by, self.settings.images, self.settings.paired, self.reference().store.key])


def run_eval(
    subject: Subject,
    rows: Sequence[EvalRow],
    output_dir: str | Path,
    settings: Settings,
    *,
    workers: int = 1,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw with the 16-bit model and with every row, score, and write the results.

    Writes ``results.json``, ``table.md``, ``grid.png`` and ``report.html`` into ``output_dir``. They name the
    rows that failed, which do not stop the others; the next run tries those again.

    Args:
        subject: the pipeline; see :func:`find_subject`.
        rows: see :func:`parse_rows`.
        workers: number of rows made at the same time, each by a process of one thread; 1 makes them here, one by one.
        command: the user's command line, for the report.
        progress: a running rich progress display to draw bars on.

    Returns:
        the content of ``results.json``: ``{"rows": [...], "run": {...}}``.

    Raises:
        ConfigError: the 16-bit model cannot be run, ``output_dir`` cannot be written, or another run is writing there.
    """
    root = Path(output_dir)
    with held(root, subject.source):
        jobs = [Job(row, subject, settings, root) for row in (REFERENCE, *rows)]
        try:
            run_jobs(_make_row, jobs[:1], workers=1, steps=_steps(jobs[:1]), progress=progress)
            if failure := jobs[0].store.facts().get("failed"):
                raise ConfigError(f"the 16-bit model of {subject.name} cannot be run: {failure}")
            waiting = [job for job in jobs[1:] if not _is_done(job)]
            if waiting:
                workers = min(workers, len(waiting))
                run_jobs(
                    _make_row, waiting[::-1] if workers > 1 else waiting, workers=workers, steps=_steps(waiting), progress=progress
                )
        except BrokenProcessPool as error:
            raise QDiffError(
                "a worker process was killed, perhaps for want of memory; the same command with fewer --workers goes on"
            ) from error
        finally:
            results: dict[str, Any] = {"rows": [_result(job) for job in jobs], "run": _run_facts(subject, settings, command)}
            if "failed" not in results["rows"][0] and results["rows"][0]["images"]:
                made = [(job.row, job.store) for job in jobs]
                write_outputs(root, results, made, subject)
    return results


def _make_row(job: Job, reporter: Reporter) -> None:
    """Make the missing parts of a row, and score it. An error is recorded as the row's."""
    store = job.store
    facts = {key: value for key, value in store.facts().items() if key != "failed"}
    try:
        _draw_row(job, store, facts, reporter)
        if facts.get("score_key") != job.score_key():
            reporter.start(f"{job.row.name}: scoring")
            facts |= {"scores": _scores(job), "score_key": job.score_key()}
    except Exception as error:
        facts["failed"] = describe_failure(error)
    store.write_facts(facts)


def _draw_row(job: Job, store: RowStore, facts: Costs, reporter: Reporter) -> None:
    """Build the row's pipeline, run it on the probes, and draw the missing images."""
    settings = job.settings
    have = store.count_images()
    if have >= settings.images and "step_errors" in facts:
        return
    reporter.start(f"{job.row.name}: {'loading' if job.row.kind in ('reference', 'folder') else 'quantizing'}")
    pipe = build(job.row, job.subject, store.folder, getattr(torch, settings.dtype), settings.device, facts)
    store.write_facts(facts)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        _ask_and_sample(job, store, facts, reporter, pipe, have)
    facts |= {"machine": machine_facts(torch.device(settings.device)), "commit": commit(), "threads": torch.get_num_threads()}
    if job.row.kind == "config" and job.row.calibration is None and not settings.keep_models:
        shutil.rmtree(store.folder / MODEL, ignore_errors=True)


def _ask_and_sample(job: Job, store: RowStore, facts: Costs, reporter: Reporter, pipe: Any, have: int) -> None:
    settings = job.settings
    if "step_errors" not in facts:
        reporter.start(f"{job.row.name}: probing")
        facts |= _probe(job, pipe)
    if have < settings.images:
        reporter.start(f"{job.row.name}: sampling", _steps([job]))
    drawing, seconds, count = settings.dtype, 0.0, 0
    for first, last, dtype in settings.parts(have):
        if dtype != drawing:
            pipe = build(job.row, job.subject, store.folder, getattr(torch, dtype), settings.device, dict(facts))
            drawing = dtype
        start = time.perf_counter()
        store.add_images(first, _draw(job, pipe, first, last, reporter.step))
        if dtype == settings.dtype:
            seconds, count = seconds + time.perf_counter() - start, count + last - first
    if count:
        facts["seconds_per_image"] = None if facts.get("drawn_dense") else round(seconds / count, 4)  # not the peer's own time


def _draw(job: Job, pipe: Any, first: int, last: int, on_step: Callable[[], None] | None = None) -> torch.Tensor:
    """Images ``first`` to ``last`` of the row's sequence."""
    labels, seeds = job.subject.labels_of(last), image_seeds(last, job.settings.seed)
    return sample(
        pipe,
        None if labels is None else labels[first:],
        seeds[first:],
        steps=job.subject.steps,
        guidance_scale=job.subject.guidance_scale,
        batch_size=job.settings.batch_size,
        on_step=on_step,
        **job.subject.arguments,
    )


def _probe(job: Job, pipe: Any) -> dict[str, Any]:
    """Errors by step and by layer; the reference's row records the probes instead."""
    path = job.reference().store.folder / PROBES
    if job.row.kind == "reference":
        count = min(PROBE_IMAGES, job.settings.images)
        probes = record(pipe, lambda: _draw(job, pipe, 0, count))
        probes.save(path)
        return {"step_errors": [], "layer_errors": {}}
    probes = Probes.load(path)
    probes.to(job.settings.device)
    steps = [[timestep, float(f"{error:.4g}")] for timestep, error in step_errors(pipe, probes)]
    return {"step_errors": steps, "layer_errors": {name: float(f"{e:.4g}") for name, e in layer_errors(pipe, probes).items()}}


def _scores(job: Job) -> dict[str, Any]:
    settings, subject = job.settings, job.subject
    reference = job.reference().store.images(settings.images)
    labels: Any = subject.labels_of(settings.images) if subject.by_class else None
    scorer = Scorer(reference, settings.paired, labels, subject.classifier)
    if job.row.kind == "reference":
        return scorer.scores(reference, True)
    return scorer.scores(job.store.images(settings.images), False)


def _is_done(job: Job) -> bool:
    facts = job.store.facts()
    drawn = job.store.count_images() >= job.settings.images and "step_errors" in facts
    return drawn and "failed" not in facts and facts.get("score_key") == job.score_key()


def _result(job: Job) -> dict[str, Any]:
    """A row of ``results.json``."""
    facts = job.store.facts()
    if not facts:
        facts = {"failed": "not made yet"}
    row: dict[str, Any] = {"name": job.row.name, "kind": job.row.kind, "method": job.row.method, "folder": job.store.folder.name}
    row |= {"definition": job.row.definition(), "images": min(job.store.count_images(), job.settings.images)}
    return row | {key: value for key, value in facts.items() if key != "score_key"}


def _run_facts(subject: Subject, settings: Settings, command: str) -> dict[str, Any]:
    asked = "classes" if subject.by_class else "prompts" if subject.labels else "nothing"
    return {
        "model": subject.name,
        "asked for": asked,
        "labels": list(subject.labels or ()),
        "steps": subject.steps,
        "guidance_scale": subject.guidance_scale,
        "arguments": subject.arguments,
        "command": command,
    } | {key: value for key, value in asdict(settings).items() if key != "keep_models"}


def _steps(jobs: Sequence[Job]) -> int:
    """Number of steps that all jobs together will report."""

    def of(job: Job) -> int:
        steps, batch_size = job.subject.steps or DEFAULT_STEPS, job.settings.batch_size
        parts = job.settings.parts(job.store.count_images())
        return sum(num_steps(last - first, steps=steps, batch_size=batch_size) for first, last, _ in parts)

    return sum(map(of, jobs))
