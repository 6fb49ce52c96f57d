"""``qdiff quantize``. What its help says about methods comes from the methods themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.settings import ASSIGNMENTS
from ..errors import ConfigError
from ..methods import DEFAULT_METHOD, METHODS
from ..methods.base import default_first
from ..methods.targets import TARGETS, check_target, target_config
from .console import stdout

CLASSES = re.compile(r"[\d,\s-]+")
DTYPES = ("bfloat16", "float16", "float32")


def describe_methods() -> str:
    """What each method is, for the help: ``name: summary``."""
    return "; ".join(f"{method.name}: {method.summary}" for method in default_first())


def describe_widths() -> str:
    """Bit widths that each method offers, for the help."""
    return "; ".join(f"{m.name}: {', '.join(f'{b:g}' for b in m.config.bit_choices)}" for m in default_first())


def describe_activations() -> str:
    """Number formats of activations, each with the methods that have it, for the help."""
    return _with_owners({method.name: method.config.activation_choices for method in default_first()})


def describe_assignments() -> str:
    """Values of ``Tuning.assignments``, each with the methods whose default settings have it, for the help."""
    offers: dict[str, list[str]] = {}
    for method in default_first():
        with suppress(ConfigError):  # a method may have no default settings
            config = make_config(method.name, {})
            offers[method.name] = [name for name in ASSIGNMENTS if config.moves_by(name)]
    return _with_owners(offers)


def owners(field: str) -> str:
    """Names of the methods whose config has ``field``, for the help."""
    return ", ".join(m.name for m in default_first() if field in {f.name for f in fields(m.config)})


def _with_owners(offers: Mapping[str, Sequence[str]]) -> str:
    """All choices that methods offer; those that not every method has are followed by the names of the methods."""
    found: dict[str, list[str]] = {}
    for name, choices in offers.items():
        for choice in choices:
            found.setdefault(choice, []).append(name)
    return ", ".join(c + (f" ({', '.join(names)} only)" if len(names) < len(offers) else "") for c, names in found.items())


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a pipeline, or folder of a model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    method: Annotated[str, typer.Option("-m", "--method", help=f"Quantization method. {describe_methods()}.")] = DEFAULT_METHOD,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help=f"Instead of a method: a format of another program that holds the result exactly: {', '.join(TARGETS)}.",
        ),
    ] = None,
    bits: Annotated[float | None, typer.Option("-b", "--bits", help=f"Nominal bits per weight. {describe_widths()}.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help=f"Rank of the low-rank branch ({owners('rank')}), 0 for none; by default scaled with each layer."),
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help=f"Number of weights that share a scale ({owners('group_size')}); or row, or tensor.")
    ] = None,
    weight_format: Annotated[
        str | None,
        typer.Option(help=f"Number format of the weights ({owners('weight_format')}) instead of --bits: nvfp4, e2m1, int4, ..."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help=f"Number format of the layers' inputs: {describe_activations()}; by default 16 bits."),
    ] = None,
    activation_scales: Annotated[
        str | None,
        typer.Option(
            help="Scales of int8 and fp8 activations: token (one per token, at run time); with --calibrate also static, timestep."
        ),
    ] = None,
    smoothing: Annotated[
        bool | None,
        typer.Option(
            "--smoothing", help=f"Divide inputs by a vector found for each layer ({owners('smoothing')}); needs --calibrate."
        ),
    ] = None,
    rotation: Annotated[
        bool | None,
        typer.Option(
            "--rotation/--no-rotation", help="Rotate the layers' inputs by Hadamard matrices; by default as the method prefers."
        ),
    ] = None,
    effort: Annotated[int | None, typer.Option(help=f"Search effort ({owners('effort')}), from 0 (fast) to 3 (thorough).")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Part of the names of layers to leave in 16 bits; may be given several times.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(help="Component of the pipeline to quantize, by default its transformer or UNet; may be given several times."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"dtype of the parameters that are not quantized: {', '.join(DTYPES)}.")] = "bfloat16",
    use_safetensors: Annotated[
        bool | None,
        typer.Option(
            "--use-safetensors/--no-safetensors", help="Read only the source's safetensors files, or only its pickles (.bin)."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the source's files to read, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in the output folder.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Fit codes to the layers' real inputs on a file of prompts, on class labels (0,1,2 or 0-9), or on noise."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of calibration trajectories.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps of each trajectory.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the trajectories.")] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Let --bits be the mean over layers; those whose error matters more get more.")
    ] = False,
    tune: Annotated[
        int, typer.Option(min=0, help="Number of optimizer steps that tune codes, scales and biases after the calibration.")
    ] = 0,
    objective: Annotated[str, typer.Option(help="Output that the tuning fits: of the whole model, or of its blocks.")] = "model",
    assignments: Annotated[str, typer.Option(help=f"How codes change while tuning: {describe_assignments()}.")] = "pv",
    workspace: Annotated[
        Path | None, typer.Option(help="Folder for finished work, from which an interrupted calibration resumes.")
    ] = None,
    recordings: Annotated[
        Path | None, typer.Option(help="Folder for trajectories, which other calibrations of this model reuse.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Repository on the Hub to upload the result to as well.")] = None,
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
    given = {name: value for name, value in options.items() if value is not None}
    if target is not None and method != DEFAULT_METHOD:
        raise ConfigError(f"--for {target} has a method of its own; leave --method out")
    config = make_config(method, given) if target is None else target_config(target, **known_options(target, given))
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
    """Print what was written, and where it can be found."""
    from ..checkpoint.inspect import inspect_components

    console = stdout()
    for info in inspect_components(output):
        bits_per_weight, size = f"{info.bits_per_weight:.2f}", f"{info.total_bytes / 1e6:.1f} MB"
        console.print(f"{info.folder}: {len(info.layers)} layers at {bits_per_weight} bits per weight, {size} in all")
    if push:
        console.print(f"https://huggingface.co/{push}")


def conditions(text: str) -> dict[str, Any]:
    """Fields of a ``Calibration`` for the value of ``--calibrate``: "noise", class labels such as "0,3,5-9", or a prompt file."""
    if text == "noise":
        return {}
    if CLASSES.fullmatch(text):
        return {"class_labels": parse_classes(text)}
    return {"prompts": text}


def parse_classes(text: str) -> list[int]:
    """Class numbers from a text such as ``0-9``, ``1,5,7`` or ``0-3,7``.

    Raises:
        ConfigError: the text has another form.
    """
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"classes are such as 0-9 or 1,5,7, got {text!r}")
        out += range(int(first), int(last or first) + 1)
    return out


def known_options(target: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if the method of a target has them.

    Raises:
        ConfigError: the target is unknown, or its method does not have one of the options.
    """
    known = {f.name for f in fields(METHODS[check_target(target).method].config)}
    if foreign := sorted(set(options) - known):
        raise ConfigError(f"{', '.join(map(option_name, foreign))} does not go with --for {target}")
    return options


def option_name(field: str) -> str:
    """The command's option for a field of a config."""
    return f"--{field.replace('_', '-')}"


def make_config(method: str, options: dict[str, Any]) -> Any:
    """The config of a method from the command's options, which errors name.

    Raises:
        ConfigError: the method is unknown or does not have one of the options.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    kind = METHODS[method].config
    known = {f.name for f in fields(kind)}
    if foreign := sorted(set(options) - known):
        names = ", ".join(map(option_name, foreign))
        raise ConfigError(f"{names} does not go with --method {method}")
    return kind(**options)
