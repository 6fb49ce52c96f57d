"""``qdiff eval``"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import ConfigError
from .console import progress_bars, stdout
from .demo import check_device, default_workers
from .quantize import DTYPES, parse_classes

COUNTS = ("images", "paired", "seed", "batch_size")
FILE_SETTINGS = ("model", "steps", "guidance_scale", "classes", "prompts", "dtype", "rest_dtype", *COUNTS)


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="Pipeline to evaluate: its folder or Hub name, or dit or unet, which come with the package."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--config",
            help="Row: a method and settings (aq:bits=2,activations=int8), a peer or a folder; may be repeated.",
        ),
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="YAML or JSON file with rows and settings.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; results that it holds already are kept.")] = Path(
        "eval"
    ),
    images: Annotated[int | None, typer.Option(min=1, help="Number of images per row. [default: 200]")] = None,
    paired: Annotated[
        int | None,
        typer.Option(min=1, help="Number of these images that are compared with the 16-bit model's one by one. [default: 64]"),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line, for a text-to-image pipeline.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class labels such as 0-9 or 1,5,7, for a class-conditional pipeline.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of denoising steps; by default the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; by default the pipeline's own.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the images, such as 512x512; by default the pipeline's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the set of images. [default: 0]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Number of images per call of the pipeline. [default: 50]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute in; by default float32 on a CPU and bfloat16 on a GPU.")
    ] = None,
    rest_dtype: Annotated[
        str | None,
        typer.Option(help="dtype for the images beyond the paired ones; bfloat16 takes half the time. [default: as --dtype]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device to compute on, such as cpu or cuda; by default a GPU if there is one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of rows evaluated at the same time; by default one per core, or one on a GPU.")
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep every quantized model in the output folder.")] = False,
    peers: Annotated[bool, typer.Option("--list-peers", help="List the peers that a row can name, and exit.")] = False,
) -> None:
    """Compare quantized versions of a pipeline at the same seeds: scores with intervals, pictures, and one page with all."""
    import torch

    from ..evaluation.evaluate import Settings, run_eval
    from ..evaluation.rows import parse_rows, read_row_file
    from ..evaluation.subject import find_subject

    if peers:
        return _list_peers(check_device(device) or "cpu")
    data = _checked(read_row_file(rows), rows) if rows else {"rows": []}
    place = check_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    given: dict[str, Any] = {"images": images, "paired": paired, "seed": seed, "batch_size": batch, "dtype": dtype, "steps": steps}
    given |= {
        "model": model,
        "guidance_scale": guidance,
        "rest_dtype": rest_dtype,
        "prompts": prompts,
        "classes": parse_classes(classes) if classes else None,
    }
    chosen = data | {key: value for key, value in given.items() if value is not None}
    if not chosen.get("model"):
        raise ConfigError("name a model: dit, unet, or a pipeline's folder or Hub name")
    subject = find_subject(
        str(chosen["model"]),
        prompts=_prompts(chosen.get("prompts"), rows),
        classes=chosen.get("classes"),
        steps=chosen.get("steps"),
        guidance_scale=chosen.get("guidance_scale"),
        arguments=_size(size),
    )
    entries = parse_rows([*data["rows"], *(config or [])], subject)
    usual = "float32" if place == "cpu" else "bfloat16"
    kinds: dict[str, Any] = {"dtype": chosen.get("dtype") or usual, "rest_dtype": chosen.get("rest_dtype")}
    for key, kind in kinds.items():
        if kind not in (*DTYPES, *([None] if key == "rest_dtype" else [])):
            raise ConfigError(f"{key} must be one of {', '.join(DTYPES)}, got {kind!r}")
    counts = {key: chosen[key] for key in COUNTS if key in chosen}
    settings = Settings(**counts, **kinds, device=place, keep_models=keep_models)
    command = shlex.join(["qdiff", *sys.argv[1:]])
    with progress_bars() as progress:
        results = run_eval(
            subject, entries, output, settings, workers=workers or default_workers(place), command=command, progress=progress
        )
    _print(results, output)


def _checked(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings in a file of rows, checked.

    Raises:
        ConfigError: one is unknown or of another type.
    """
    if unknown := sorted(set(data) - {*FILE_SETTINGS, "rows"}):
        raise ConfigError(f"{path} has unknown settings {', '.join(unknown)}; it may have {', '.join(FILE_SETTINGS)}")
    for key in ("steps", *COUNTS):
        if key in data and (not isinstance(data[key], int) or isinstance(data[key], bool)):
            raise ConfigError(f"{path}: {key} must be a whole number, got {data[key]!r}")
    if isinstance(data.get("classes"), str):
        data["classes"] = parse_classes(data["classes"])
    return data


def _prompts(given: Any, rows: Path | None) -> Any:
    """Prompts that a file of rows lists, or the path of a prompt file that it names, relative to its own folder."""
    if isinstance(given, str):
        return (rows.parent if rows else Path()) / given
    return given


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    width, times, height = text.partition("x")
    if not times or not width.isdigit() or not height.isdigit():
        raise ConfigError(f"size is such as 512x512 (width x height), got {text!r}")
    return {"width": int(width), "height": int(height)}


def _list_peers(device: str) -> None:
    import torch

    from ..evaluation.peers import PEERS

    for name, peer in PEERS.items():
        stdout().print(f"{name:<24} {peer.unavailable(torch.device(device)) or ''}", highlight=False)


def _print(results: dict[str, Any], output: Path) -> None:
    from ..evaluation.tables import about, columns_of, notes

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = columns_of(results["rows"])
    table.add_column("Row", overflow="fold")
    for column in columns:
        table.add_column(f"{column.heading}\n{column.note}", justify="right", no_wrap=True)
    for row in results["rows"]:
        name = f"{row['name']} [red]{notes(row)}[/]" if "failed" in row else row["name"]
        table.add_row(name, *(column.show(row, with_margin=False) for column in columns))
    console = stdout()
    console.print(table)
    console.print(about(results["run"]), highlight=False)
    for name in ("report.html", "table.md", "grid.png", "results.json"):
        typer.echo(f"  {output / name}")
