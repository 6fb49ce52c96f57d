"""``Quantize Model`` and ``Save Quantized Model``."""

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
LONGEST = 200  # bytes of a folder's name; file systems take 255


def _bits(*choices: str, default: str = "4") -> io.Input:
    return io.Combo.Input(
        "bits", options=list(choices), default=default, tooltip="Nominal bits per weight; a little more is stored."
    )


def _activations(*choices: str) -> io.Input:
    tip = "What inputs of the layers are rounded to at run time. none: 16 bits. int8 and fp8 use the fast matrix units."
    return io.Combo.Input("activations", options=["none", *choices], default="none", tooltip=tip)


METHODS = {
    "svdquant": [
        _bits("2", "3", "4", "8"),
        io.Int.Input("rank", default=0, min=0, max=512, tooltip="Of the 16-bit low-rank branch. 0: scaled with each layer."),
        _activations("int8", "fp8", "int4", "nvfp4"),
    ],
    "fp": [
        io.Combo.Input(
            "format",
            options=["3 bits", "4 bits", "5 bits", "6 bits", "8 bits", "nvfp4", "mxfp4", "mxfp8"],
            default="4 bits",
            tooltip="Floating point numbers of this width, the encoding searched for each layer; or one of the hardware formats.",
        ),
        _activations("int8", "fp8"),
    ],
    "vq": [_bits("2", "3", "4", "8", default="3"), _activations("int8", "fp8")],
    "aq": [
        _bits("1", "1.5", "2", "3", "4", default="2"),
        io.Int.Input("effort", default=1, min=0, max=3, tooltip="0 is fast, 3 is thorough and takes many times longer."),
        _activations("int8", "fp8"),
    ],
    "rtn": [_bits("2", "3", "4", "5", "6", "8", default="8"), _activations("int8", "fp8")],
}


class QuantizeModel(io.ComfyNode):
    """Any MODEL in, a quantized MODEL out."""

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
                    options=[io.DynamicCombo.Option(name, inputs) for name, inputs in METHODS.items()],
                    tooltip="svdquant: 4 bits with the least loss. fp: hardware formats. vq, aq: codebooks, for 2 and 3 bits. rtn: "
                    "plain rounding, quickest.",
                ),
                io.String.Input(
                    "skip",
                    default="",
                    tooltip="Parts of layer names to leave as they are, separated by commas: norm, proj_out. diffusers' names.",
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
                    tooltip="Of everything random in the method.",
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
    """The config for what the node shows."""
    from qdiff_diffusers import QDiffConfig

    options = {key: value for key, value in method.items() if key != "method"}
    bits = options.pop("bits", None)
    shown = options.pop("format", None)
    if shown is not None:
        bits, weight_format = (shown.split()[0], None) if shown.endswith("bits") else (None, shown)
        options["weight_format"] = weight_format
    if options.get("rank") == 0:
        del options["rank"]
    return QDiffConfig(
        method=method["method"],
        bits=None if bits is None else float(bits),
        modules_to_not_convert=[part.strip() for part in skip.split(",") if part.strip()] or None,
        keep_outer_layers=not outer_layers,
        seed=seed,
        **options,
    )


class SaveModel(io.ComfyNode):
    """A quantized MODEL into ``models/qdiff``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffSaveModel",
            display_name="Save Quantized Model (qdiff)",
            category="qdiff",
            description="Stores a quantized MODEL in models/qdiff, as a folder that Load Quantized Model and diffusers' "
            "from_pretrained read. Its safetensors file is complete in itself and may be moved or shared alone.",
            search_aliases=["save", "export", "checkpoint"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input("name", default="my-model-4bit", tooltip="Folder in models/qdiff; slashes make subfolders."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return problem() or (name is not None and _problem_with(name)) or True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **kwargs: Any) -> bool:
        return name is not None and _problem_with(name) is None

    @classmethod
    def execute(cls, model: Any, name: str) -> io.NodeOutput:
        require()
        from comfy_api.latest import ui

        from qdiff_diffusers.errors import ConfigError

        from ..quantize import save_model

        if reason := _problem_with(name):  # where another node has made it
            raise ConfigError(reason)

        file = save_model(model, _target(name))
        return io.NodeOutput(ui=ui.PreviewText(f"{file.parent}: {file.stat().st_size / 1e6:.1f} MB"))


def _target(name: str) -> Path:
    return Path(folder_paths.models_dir, OURS, name)


def _problem_with(name: str) -> str | None:
    """Why no model can be saved under a name; ``None`` if one can."""
    parts = name.split("/")
    if not NAME.fullmatch(name) or any(part.endswith((" ", ".")) for part in parts):
        return f"name must be a folder inside models/qdiff, made of letters, digits, spaces and . _ - + ( ) [ ], got {name!r}"
    if any(len(part.encode()) > LONGEST for part in parts):
        return f"name is too long for a folder: {name!r}"
    if _target(name).exists():
        return f"{_target(name)} exists already; choose another name, or delete it"
    for parent in list(_target(name).parents)[: len(parts) - 1]:
        if (parent / "config.json").exists() or parent.is_file():
            return f"{parent} is a model itself; choose another folder than {name!r}"
    return None
