"""``qdiff bench``"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.folders import held
from ..checkpoint.writing import write_text
from ..errors import ConfigError
from .console import progress_bars, stdout
from .demo import check_device
from .quantize import DTYPES

if TYPE_CHECKING:
    import torch

bench = typer.Typer(
    help="Measure the speed of layers and whole models beside torch and every installed peer.", no_args_is_help=True
)

Only = Annotated[str | None, typer.Option(help="Contenders to time, by family or name: ours,torchao,qdiff-aq2*; by default all.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the JSON and markdown files.")]
Device = Annotated[str | None, typer.Option(help="Device to compute on, such as cpu or cuda; by default a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="dtype of the dense baseline and of all inputs.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of CPU threads; by default torch's own choice.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep times in the output folder that are of the same machine and versions.")
]
Budget = Annotated[float, typer.Option(help="Seconds of timing for each contender in each cell of the table.")]


@bench.command()
def layers(
    shapes: Annotated[
        str,
        typer.Option(help="Shapes of layers, such as 3072x12288 (in x out) or conv640@32 (channels @ size); linear, conv or all."),
    ] = "3072x3072",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens at which linear layers are timed.")] = "1,16,256,1024",
    only: Only = None,
    output: Output = Path("bench"),
    device: Device = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    budget: Budget = 0.3,
    resume: Resume = False,
) -> None:
    """Time single layers; every contender's output is checked against float64 first."""
    from ..bench.layers import CONV, LINEAR, Shape, count_cells, run_layers
    from ..bench.report import layers_markdown

    groups = {"linear": LINEAR, "conv": CONV, "all": (*LINEAR, *CONV)}
    wanted = [Shape.parse(name) for word in _words(shapes) for name in groups.get(word, (word,))]
    counts, words = _counts(tokens), _words(only) if only else None
    place, kind = _prepare(device, dtype, threads, budget)
    results = _results(output / f"layers_{place.type}", place, kind, budget, resume)
    with held(output, name=results.path.name), _quiet(), progress_bars() as progress:
        task = progress.add_task("layers", total=count_cells(wanted, counts, words, place))
        run_layers(
            results,
            wanted,
            counts,
            device=place,
            dtype=kind,
            budget=budget,
            only=words,
            advance=lambda what: progress.update(task, advance=1, description=what),
        )
    _finish(results, layers_markdown(results))


@bench.command()
def models(
    model: Annotated[
        list[str] | None, typer.Option(help="Model to time, such as dit-xl-2 or flux-slice; may be given several times.")
    ] = None,
    only: Only = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Each of ours under torch.compile, too.")] = False,
    output: Output = Path("bench"),
    device: Device = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    budget: Budget = 10,
    resume: Resume = False,
) -> None:
    """Time one step of whole models with random weights at their real shapes."""
    from ..bench.models import find_model, model_contenders, run_models
    from ..bench.ours import Packer
    from ..bench.report import models_markdown

    names = model or ["dit-xl-2"]
    words = _words(only) if only else None
    for name in names:
        find_model(name)
    place, kind = _prepare(device, dtype, threads, budget)
    total = len(model_contenders(place, Packer(), words, compiled)) * len(names)
    results = _results(output / f"models_{place.type}", place, kind, budget, resume)
    with held(output, name=results.path.name), _quiet(), progress_bars() as progress:
        task = progress.add_task("models", total=total)
        run_models(
            results,
            names,
            device=place,
            dtype=kind,
            budget=budget,
            only=words,
            compiled_too=compiled,
            advance=lambda what: progress.update(task, advance=1, description=what),
        )
    _finish(results, models_markdown(results))


@bench.command("list")
def list_contenders(device: Device = None) -> None:
    """List every contender, and what is missing for those that cannot run here."""
    from ..bench.layers import contenders_for
    from ..bench.ours import Packer

    place, _ = _prepare(device, "bfloat16", None, 1)
    console = stdout()
    for contender in contenders_for(place, Packer(), None):
        console.print(f"{contender.name:<26} {contender.family:<14} {contender.unavailable(place) or ''}", highlight=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and log lines of the other packages, some of which come with every call, out of the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _prepare(device: str | None, dtype: str, threads: int | None, budget: float) -> tuple[torch.device, torch.dtype]:
    """Check the options that all benchmarks share, and set the number of threads."""
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not budget > 0:
        raise ConfigError(f"budget must be a positive number of seconds, got {budget}")
    if threads is not None:
        torch.set_num_threads(threads)
        _set_numba_threads(threads)
    name = check_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name), getattr(torch, dtype)


def _set_numba_threads(threads: int) -> None:
    try:
        import numba
    except ImportError:
        return
    numba.set_num_threads(min(threads, int(numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"expected names with commas between them, got {text!r}")
    return words


def _counts(text: str) -> list[int]:
    words = _words(text)
    if bad := [word for word in words if not word.isdigit() or int(word) < 1]:
        raise ConfigError(f"tokens must be positive whole numbers such as 1,16,1024, got {bad[0]!r}")
    return sorted({int(word) for word in words})


def _results(path: Path, device: torch.device, dtype: torch.dtype, budget: float, resume: bool) -> Any:
    from ..bench.results import Results, busy, facts

    results = Results(path, facts(device, dtype, budget), resume)
    if results.dropped:
        typer.echo(f"{results.json} was measured with other {', '.join(results.dropped)}: starting anew", err=True)
    if busy(results.facts):
        typer.echo(f"other programs use {results.facts['busy_cores']} cores: the times will be rough", err=True)
    return results


def _finish(results: Any, text: str) -> None:
    results.write()
    table = results.json.with_suffix(".md")
    write_text(table, text)
    typer.echo(text)
    for file in (results.json, table):
        typer.echo(f"  {file}")
