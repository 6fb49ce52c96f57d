"""``qdiff convert``"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import progress_bars, stdout

if TYPE_CHECKING:
    from ..convert.nunchaku_folder import Advance

convert = typer.Typer(help="Convert other programs' quantized checkpoints to qdiff's, and back, exactly.", no_args_is_help=True)

Output = Annotated[Path, typer.Argument(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in the output folder.")]
Config = Annotated[Path | None, typer.Option(help="Folder or config.json of the dense model, for files that hold no config.")]


@convert.command()
def nunchaku(
    source: Annotated[
        Path, typer.Argument(help="Folder of a nunchaku_lite model or pipeline, or one of Nunchaku's safetensors files.")
    ],
    output: Output,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert Nunchaku's INT4 and NVFP4 checkpoints, which then run on any device."""
    from ..convert import convert_nunchaku

    with _progress() as advance:
        convert_nunchaku(source, output, config=config, overwrite=overwrite, advance=advance)
    _report(output)


@convert.command("to-nunchaku")
def to_nunchaku(
    source: Annotated[Path, typer.Argument(help="Folder of a model with INT4 or NVFP4 SVDQuant layers.")],
    output: Output,
    dtype: Annotated[
        str | None,
        typer.Option(help="dtype of the scales, bfloat16 or float16; by default the one that holds all of them exactly."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert INT4 and NVFP4 SVDQuant models to a nunchaku_lite folder."""
    from ..convert import export_nunchaku

    with _progress() as advance:
        export_nunchaku(source, output, dtype=dtype, overwrite=overwrite, advance=advance)
    stdout().print(f"{output}", highlight=False)


@convert.command()
def comfy(
    source: Annotated[Path, typer.Argument(help="A safetensors file in a quantized format of ComfyUI's.")],
    output: Output,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert ComfyUI's FP8, INT8, NVFP4, MXFP8 and ConvRot files."""
    from ..convert import convert_comfy

    with _progress() as advance:
        convert_comfy(source, output, config=config, overwrite=overwrite, advance=advance)
    _report(output)


@convert.command("to-comfy")
def to_comfy(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a quantized model or pipeline.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write, for ComfyUI's models/diffusion_models.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Let ComfyUI quantize the inputs of layers that have them in 16 bits here, too.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Convert a model that was quantized for ComfyUI (qdiff quantize --for comfyui:...) to one file for its own loader."""
    from ..convert import export_comfy

    with _progress() as advance:
        export_comfy(source, output, fast=fast, overwrite=overwrite, advance=advance)
    stdout().print(f"{output}: {output.stat().st_size / 1e6:.1f} MB", highlight=False)


@convert.command()
def gguf(
    source: Annotated[Path, typer.Argument(help="A .gguf file.")],
    output: Output,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert GGUF files of diffusion models: Q4_0 to Q8_0, Q4_K to Q6_K, IQ4_NL and 16 bits."""
    from ..convert import convert_gguf

    with _progress() as advance:
        convert_gguf(source, output, config=config, overwrite=overwrite, advance=advance)
    _report(output)


@convert.command()
def bfl(
    source: Annotated[Path, typer.Argument(help="A safetensors file with FP8 or NVFP4 weights.")],
    output: Output,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert Black Forest Labs' FP8 and NVFP4 files."""
    from ..convert import convert_bfl

    with _progress() as advance:
        convert_bfl(source, output, config=config, overwrite=overwrite, advance=advance)
    _report(output)


@contextmanager
def _progress() -> Iterator[Advance]:
    with progress_bars() as progress:
        task = progress.add_task("tensors", total=None)
        yield lambda done, total, name: progress.update(task, completed=done, total=total, description=name[-36:])


def _report(output: Path) -> None:
    from ..checkpoint.inspect import inspect_components

    for info in inspect_components(output):
        bits, size = f"{info.bits_per_weight:.2f}", f"{info.total_bytes / 1e6:.1f} MB"
        stdout().print(f"{info.folder}: {len(info.layers)} layers at {bits} bits per weight, {size} in all")
