"""The nodes ``Quantize Model`` and ``Save Quantized Model``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..folders import OURS
from ..package import problem, require

NAME = re.compile(r"[\w][\w .+()\[\]-]*(/[\w][\w .+()\[\]-]*)*")  # no folder begins with a dot: those are not searched
COMFYUI = "comfyui"  # the other format to save in, besides OURS
FALLBACK = "svdquant"  # shown where the package, which knows the methods, is missing
LONGEST = 200  # bytes of a folder's name; file systems take 255


def method_inputs() -> dict[str, list[io.Input]]:
    """The methods in the order to offer them, each with its inputs, as the method objects describe them.

    Without the qdiff package the nodes still appear, with ``FALLBACK`` alone, and say what is missing.
    """
    if problem():
        return {FALLBACK: []}
    from qdiff_diffusers.methods.base import default_first

    return {method.name: _inputs(method) for method in default_first()}


def method_tooltip() -> str:
    """One sentence on each method, or what is missing where the methods cannot be imported."""
    if problem():
        return problem() or ""
    from qdiff_diffusers.methods.base import default_first

    return " ".join(f"{method.name}: {method.summary}." for method in default_first())


def _inputs(method: Any) -> list[io.Input]:
    widths, default = [f"{bits:g}" for bits in method.config.bit_choices], f"{method.suggested_bits:g}"
    tip = "Nominal bits per weight; a little more is stored."
    first = io.Combo.Input("bits", options=widths, default=default, tooltip=tip)
    if method.named_formats:
        formats = [*(f"{bits} bits" for bits in widths), *method.named_formats]
        tip = "Width of the numbers, whose format is searched for each layer; or one of the hardware formats."
        first = io.Combo.Input("format", options=formats, default=f"{default} bits", tooltip=tip)
    more = [io.Int.Input(o.name, default=o.default, min=o.low, max=o.high, tooltip=o.help) for o in method.options]
    tip = "Number format of the layers' inputs at run time. none: 16 bits. int8 and fp8 use the fast matrix units."
    kinds = ["none", *method.config.activation_choices]
    return [first, *more, io.Combo.Input("activations", options=kinds, default="none", tooltip=tip)]


class QuantizeModel(io.ComfyNode):
    """The node that quantizes a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffQuantizeModel",
            display_name="Quantize Model (qdiff)",
            category="qdiff",
            description="Quantizes a loaded MODEL layer by layer, without calibration data. LoRAs on it are baked in. Connect "
            "Save Quantized Model to keep the result.",
            search_aliases=["quantize", "compress", "low bit", "svdquant", "nvfp4", "additive quantization"],
            inputs=[
                io.Model.Input("model"),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(name, inputs) for name, inputs in method_inputs().items()],
                    tooltip=method_tooltip(),
                ),
                io.String.Input(
                    "skip",
                    default="",
                    tooltip="Parts of diffusers' names of layers to leave as they are, separated by commas: norm, proj_out.",
                ),
                io.Boolean.Input(
                    "outer_layers",
                    default=False,
                    advanced=True,
                    tooltip="Also quantize the layers outside of the repeated blocks: embedders, final projection.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    advanced=True,
                    control_after_generate=False,  # another seed at every run would quantize anew at every run
                    tooltip="Seed of everything random in the method.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, method: dict[str, Any], skip: str = "", outer_layers: bool = False, seed: int = 0
    ) -> io.NodeOutput:
        require()
        import comfy.model_management
        import comfy.utils

        from ..plots import GrowingPlot
        from ..previews import preview
        from ..quantize import quantize_model

        bar, plot = comfy.utils.ProgressBar(1), GrowingPlot()

        def progress(done: Mapping[str, Any], total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(len(done), total, preview(lambda: plot(done, total)))

        return io.NodeOutput(quantize_model(model, make_config(method, skip, outer_layers, seed), progress))


def make_config(method: dict[str, Any], skip: str, outer_layers: bool, seed: int) -> Any:
    """The config for the node's inputs."""
    from qdiff_diffusers import QDiffConfig
    from qdiff_diffusers.methods import METHODS

    options = {key: value for key, value in method.items() if key != "method"}
    bits = options.pop("bits", None)
    shown = options.pop("format", None)
    if shown is not None:
        bits, weight_format = (shown.split()[0], None) if shown.endswith("bits") else (None, shown)
        options["weight_format"] = weight_format
    known = METHODS.get(method["method"])  # QDiffConfig refuses an unknown method
    unset = {option.name: option.unset for option in (known.options if known else ()) if option.unset is not None}
    options = {key: value for key, value in options.items() if key not in unset or value != unset[key]}
    return QDiffConfig(
        method=method["method"],
        bits=None if bits is None else float(bits),
        modules_to_not_convert=[part.strip() for part in skip.split(",") if part.strip()] or None,
        keep_outer_layers=not outer_layers,
        seed=seed,
        **options,
    )


class SaveModel(io.ComfyNode):
    """The node that saves a quantized MODEL in ``models/qdiff``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffSaveModel",
            display_name="Save Quantized Model (qdiff)",
            category="qdiff",
            description="Stores a quantized MODEL: in models/qdiff, as a folder that Load Quantized Model and diffusers' "
            "from_pretrained read, whose safetensors file may be moved or shared alone; or in models/diffusion_models, as one file "
            "in ComfyUI's own formats for its own loader.",
            search_aliases=["save", "export", "checkpoint"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input("name", default="my-model-4bit", tooltip="Folder, or file, to write; slashes make subfolders."),
                io.Combo.Input(
                    "format",
                    options=[OURS, COMFYUI],
                    default=OURS,
                    optional=True,
                    tooltip="comfyui: a file for Load Diffusion Model, which needs no nodes of qdiff's. Every number stays as it "
                    "is; layers that no format of ComfyUI's holds exactly are named, and nothing is written.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None, format: str = OURS) -> bool | str:
        if format not in (OURS, COMFYUI):
            return f"format must be {OURS} or {COMFYUI}, got {format!r}"
        return problem() or (name is not None and _problem_with(name, format)) or True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, format: str = OURS, **kwargs: Any) -> bool:
        return name is not None and _problem_with(name, format) is None

    @classmethod
    def execute(cls, model: Any, name: str, format: str = OURS) -> io.NodeOutput:
        require()
        from comfy_api.latest import ui

        from qdiff_diffusers.errors import ConfigError

        from ..quantize import save_for_comfyui, save_model

        if reason := _problem_with(name, format):  # where another node provides the name
            raise ConfigError(reason)

        if format == COMFYUI:
            file = save_for_comfyui(model, _file(name))
            return io.NodeOutput(ui=ui.PreviewText(f"{file}: {file.stat().st_size / 1e6:.1f} MB"))
        file = save_model(model, _target(name))
        return io.NodeOutput(ui=ui.PreviewText(f"{file.parent}: {file.stat().st_size / 1e6:.1f} MB"))


def _target(name: str) -> Path:
    return Path(folder_paths.models_dir, OURS, name)


def _file(name: str) -> Path:
    """The file in ComfyUI's formats with this name."""
    return Path(folder_paths.models_dir, "diffusion_models", f"{name.removesuffix('.safetensors')}.safetensors")


def _problem_with(name: str, format: str = OURS) -> str | None:
    """Why no model can be saved under a name; ``None`` if one can."""
    parts = name.split("/")
    if not NAME.fullmatch(name) or any(part.endswith((" ", ".")) for part in parts):
        place = "a file inside models/diffusion_models" if format == COMFYUI else "a folder inside models/qdiff"
        return f"name must be {place}, made of letters, digits, spaces and . _ - + ( ) [ ], got {name!r}"
    if any(len(part.encode()) > LONGEST for part in parts):
        return f"name is too long for a folder: {name!r}"
    if format == COMFYUI:
        return f"{_file(name)} exists already; choose another name, or delete it" if _file(name).exists() else None
    if _target(name).exists():
        return f"{_target(name)} exists already; choose another name, or delete it"
    for parent in list(_target(name).parents)[: len(parts) - 1]:
        if (parent / "config.json").exists() or parent.is_file():
            return f"{parent} is a model itself; choose another folder than {name!r}"
    return None
