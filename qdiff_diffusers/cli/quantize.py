"""``qdiff quantize``"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import stdout

CLASSES = re.compile(r"[\d,\s-]+")
DTYPES = ("bfloat16", "float16", "float32")


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a pipeline, or folder of a model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    method: Annotated[str, typer.Option("-m", "--method", help="aq, vq, fp, svdquant or rtn.")] = "svdquant",
    bits: Annotated[float | None, typer.Option("-b", "--bits", help="Nominal bits per weight.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of svdquant's low-rank branch.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Weights per scale: a number, row or tensor.")] = None,
    weight_format: Annotated[str | None, typer.Option(help="For fp and svdquant: e2m1, nvfp4, ...")] = None,
    activations: Annotated[str | None, typer.Option(help="int8, fp8 or int4 (svdquant).")] = None,
    activation_scales: Annotated[
        str | None, typer.Option(help="Of int8 and fp8: token, or with --calibrate static or timestep.")
    ] = None,
    smoothing: Annotated[bool | None, typer.Option("--smoothing", help="Of svdquant, with --calibrate.")] = None,
    rotation: Annotated[bool | None, typer.Option("--rotation/--no-rotation", help="Hadamard rotation.")] = None,
    effort: Annotated[int | None, typer.Option(help="Of aq: 0 is fast, 3 is thorough.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave layers with this in their name in 16 bits.")] = None,
    component: Annotated[list[str] | None, typer.Option(help="Of the pipeline; its transformer or UNet if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of all that is not quantized.")] = "bfloat16",
    use_safetensors: Annotated[
        bool | None,
        typer.Option("--use-safetensors/--no-safetensors", help="Read only safetensors, or only pickles (.bin), of the source."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Files of the source to read, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in the output folder.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(help="A file of prompts, class labels (0,1,2 or 0-9), or noise: fit codes to what layers really see."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration trajectories.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a trajectory.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the trajectories.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Let --bits be the mean, more for layers that matter more.")] = False,
    tune: Annotated[int, typer.Option(min=0, help="Optimizer steps after that, on codes, scales and biases.")] = 0,
    objective: Annotated[str, typer.Option(help="What to tune: model or blocks.")] = "model",
    assignments: Annotated[
        str, typer.Option(help="How codes move: pv, candidates (vq), rounding (scalar formats) or fixed.")
    ] = "pv",
    workspace: Annotated[Path | None, typer.Option(help="Where finished work waits for another run.")] = None,
    recordings: Annotated[Path | None, typer.Option(help="Where trajectories stay for other calibrations of this model.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload to this Hub name.")] = None,
) -> None:
    """Quantize a model or pipeline and save it."""
    import torch

    from .. import api
    from ..calibration import Calibration, Tuning

    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options = {
        "bits": bits,
        "rank": rank,
        "group_size": int(group_size) if group_size and group_size.isdigit() else group_size,
        "weight_format": weight_format,
        "activations": activations,
        "activation_scales": activation_scales,
        "smoothing": smoothing,
        "rotation": rotation,
        "effort": effort,
        "modules_to_not_convert": skip or None,
        "seed": seed,
    }
    config = make_config(method, {name: value for name, value in options.items() if value is not None})
    if calibrate is None and (samples or guidance or tune or workspace or recordings or mixed):
        raise ConfigError("--samples, --guidance, --mixed, --tune, --workspace and --recordings go with --calibrate")
    calibration = None
    if calibrate is not None:
        calibration = Calibration(
            **conditions(calibrate),
            samples=samples,
            steps=steps,
            guidance_scale=guidance,
            mixed=mixed,
            tuning=Tuning(steps=tune, objective=objective, assignments=assignments),
            seed=seed,
            workspace=workspace,
            recordings=recordings,
        )
    api.quantize(
        source,
        config,
        output,
        calibration=calibration,
        components=component or None,
        dtype=getattr(torch, dtype),
        overwrite=overwrite,
        push_to_hub=push,
        use_safetensors=use_safetensors,
        variant=variant,
        revision=revision,
    )
    _tell(output, push)


def _tell(output: Path, push: str | None) -> None:
    """What was written, and where it can be found."""
    from ..checkpoint import inspect_components

    console = stdout()
    for info in inspect_components(output):
        bits_per_weight, size = f"{info.bits_per_weight:.2f}", f"{info.total_bytes / 1e6:.1f} MB"
        console.print(f"{info.folder}: {len(info.layers)} layers at {bits_per_weight} bits per weight, {size} in all")
    if push:
        console.print(f"https://huggingface.co/{push}")


def conditions(text: str) -> dict[str, Any]:
    """What ``--calibrate`` means: "noise", class labels such as "0,3,5-9", or a file of prompts."""
    if text == "noise":
        return {}
    if CLASSES.fullmatch(text):
        return {"class_labels": parse_classes(text)}
    return {"prompts": text}


def parse_classes(text: str) -> list[int]:
    """``0-9`` or ``1,5,7`` or both.

    Raises:
        ConfigError: it is neither.
    """
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"classes are such as 0-9 or 1,5,7, got {text!r}")
        out += range(int(first), int(last or first) + 1)
    return out


def make_config(method: str, options: dict[str, Any]) -> Any:
    """The config of a method, with errors that name the command's options.

    Raises:
        ConfigError: the method is unknown or does not have one of the options.
    """
    from ..config import METHODS

    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    known = {f.name for f in fields(METHODS[method])}
    if foreign := sorted(set(options) - known):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise ConfigError(f"{names} does not go with --method {method}")
    return METHODS[method](**options)
