"""``qdiff quantize``"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..methods import DEFAULT_METHOD, METHODS
from ..methods.base import default_first
from .console import stdout

CLASSES = re.compile(r"[\d,\s-]+")
DTYPES = ("bfloat16", "float16", "float32")


def describe_methods() -> str:
    """One phrase per method, for the help."""
    return "; ".join(f"{method.name}: {method.summary}" for method in default_first())


def describe_widths() -> str:
    """The widths that each method offers, for the help."""
    return "; ".join(f"{m.name}: {', '.join(f'{b:g}' for b in m.config.bit_choices)}" for m in default_first())


def describe_activations() -> str:
    """The kinds of activations, with the methods that alone have them, for the help."""
    owners: dict[str, list[str]] = {}
    for method in default_first():
        for kind in method.config.activation_choices:
            owners.setdefault(kind, []).append(method.name)
    return ", ".join(kind + (f" ({', '.join(names)} only)" if len(names) < len(METHODS) else "") for kind, names in owners.items())


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a pipeline, or folder of a model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    method: Annotated[str, typer.Option("-m", "--method", help=f"Quantization method. {describe_methods()}.")] = DEFAULT_METHOD,
    bits: Annotated[float | None, typer.Option("-b", "--bits", help=f"Nominal bits per weight. {describe_widths()}.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Rank of svdquant's low-rank branch, 0 for none; by default scaled with each layer.")
    ] = None,
    group_size: Annotated[str | None, typer.Option(help="Weights that share a scale: a number, row or tensor.")] = None,
    weight_format: Annotated[
        str | None, typer.Option(help="Number format of the weights for fp and svdquant, instead of --bits: nvfp4, e2m1, int4, ...")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help=f"Number format of the layers' inputs: {describe_activations()}; 16 bits if not given."),
    ] = None,
    activation_scales: Annotated[
        str | None,
        typer.Option(help="Scales of int8 and fp8 inputs: token (found at run time), or with --calibrate static or timestep."),
    ] = None,
    smoothing: Annotated[
        bool | None, typer.Option("--smoothing", help="Divide svdquant's inputs by a vector found on each layer; with --calibrate.")
    ] = None,
    rotation: Annotated[
        bool | None,
        typer.Option("--rotation/--no-rotation", help="Rotate inputs by Hadamard matrices; by default as the method prefers."),
    ] = None,
    effort: Annotated[int | None, typer.Option(help="Search effort of aq, from 0 (fast) to 3 (thorough).")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Part of layer names to leave in 16 bits; may be given several times.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(help="Component of the pipeline to quantize, by default its transformer or UNet; may be given several times."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"dtype of the parameters that are not quantized: {', '.join(DTYPES)}.")] = "bfloat16",
    use_safetensors: Annotated[
        bool | None,
        typer.Option("--use-safetensors/--no-safetensors", help="Read only safetensors, or only pickles (.bin), of the source."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the source's files to read, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in the output folder.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(help="A file of prompts, class labels (0,1,2 or 0-9), or noise: fit codes to what layers really see."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of calibration trajectories.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a trajectory.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the trajectories.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Let --bits be the mean, more for layers that matter more.")] = False,
    tune: Annotated[int, typer.Option(min=0, help="Optimizer steps of tuning codes, scales and biases after the calibration.")] = 0,
    objective: Annotated[str, typer.Option(help="Whose output the tuning brings closer: model or blocks.")] = "model",
    assignments: Annotated[
        str, typer.Option(help="How codes move while tuning: pv, candidates (vq), rounding (scalar formats) or fixed.")
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
    from ..checkpoint.inspect import inspect_components

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
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    kind = METHODS[method].config
    known = {f.name for f in fields(kind)}
    if foreign := sorted(set(options) - known):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise ConfigError(f"{names} does not go with --method {method}")
    return kind(**options)
