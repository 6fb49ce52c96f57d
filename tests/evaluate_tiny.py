"""``qdiff eval`` of a tiny pipeline in a folder."""

from __future__ import annotations

from pathlib import Path

from qdiff_diffusers.evaluation.evaluate import Settings, run_eval
from qdiff_diffusers.evaluation.rows import parse_rows
from qdiff_diffusers.evaluation.subject import find_subject

SMALL = Settings(images=4, paired=3, batch_size=2)


def subject_of(folder: Path, **options):
    if "classes" in options:  # the tiny transformer has no row for DiTPipeline's label of "no class"
        options = {"guidance_scale": 1.0} | options
    return find_subject(str(folder), **({"steps": 2} | options))


def evaluated(folder: Path, rows: list, output: Path, settings: Settings = SMALL, **options) -> dict:
    subject = subject_of(folder, **options)
    return run_eval(subject, parse_rows(rows, subject), output, settings)
