"""``qdiff demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import ConfigError
from .console import progress_bars, stdout

MAX_WORKERS = 8  # processes; each loads torch for itself, about half a gigabyte


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=1, help="Number of images to draw with each method.")] = 10,
    only: Annotated[str | None, typer.Option(help="Methods to show, such as aq,vq.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the set of images.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Device to compute on, such as cpu or cuda; by default a GPU if there is one.")
    ] = None,
) -> None:
    """Quantize a small real model with every method, draw the same images with each, and compare."""
    from ..evaluation.demo import run_demo

    methods = [method.strip() for method in only.split(",")] if only else None
    with progress_bars() as progress:
        results = run_demo(
            output,
            images=images,
            methods=methods,
            seed=seed,
            device=check_device(device),
            workers=default_workers(device),
            progress=progress,
        )
    console = stdout()
    console.print(_summary(results["rows"]))
    run = results["run"]
    console.print(f"{run['images']} images per row, {run['seconds']:.0f} s on {run['processor']}, {run['cores']} cores")
    for name in ("grid.png", "report.html", "results.json"):
        typer.echo(f"  {output / name}")


def check_device(device: str | None) -> str | None:
    """``device``, if torch can use it.

    Raises:
        ConfigError: torch cannot use it.
    """
    import torch

    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def default_workers(device: str | None) -> int:
    """Number of processes: one per core, or one alone on a GPU."""
    import torch

    from ..measuring.machine import cpu_count

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return min(cpu_count(), MAX_WORKERS) if on_cpu else 1


def _summary(rows: list[dict[str, Any]]) -> Table:
    from ..evaluation.report import best_of_group

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Weights", no_wrap=True)
    for heading in ("bits", "MB", "PSNR dB", "SSIM", "load s", "s/image"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = best_of_group(rows, "psnr")
    for i, row in enumerate(rows):
        if i and row["nominal_bits"] != rows[i - 1]["nominal_bits"]:
            table.add_section()
            table.add_row()
        quality = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        table.add_row(
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['size_bytes'] / 1e6:.2f}",
            f"[bold green]{quality}[/]" if row["name"] in best else quality,
            "" if row["ssim"] is None else f"{row['ssim']:.3f}",
            f"{row['load_seconds']:.1f}",
            f"{row['seconds_per_image']:.2f}",
        )
    return table
