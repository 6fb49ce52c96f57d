"""Quantizing and saving a MODEL of the graph, with ComfyUI's names translated back to diffusers'."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import diffusers
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from qdiff_diffusers import QDiffConfig
from qdiff_diffusers.checkpoint.provenance import new_provenance
from qdiff_diffusers.checkpoint.quantization import Quantization
from qdiff_diffusers.checkpoint.stored_model import write_stored_model
from qdiff_diffusers.convert.comfy_export import Piece as ExportPiece
from qdiff_diffusers.convert.comfy_export import described_model, plan, write
from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.formats import TensorInfo, dtype_name
from qdiff_diffusers.formats.layer_table import StoredLayer
from qdiff_diffusers.model.packing import quantize_named
from qdiff_diffusers.model.patterns import check_patterns
from qdiff_diffusers.model.selection import check_layers

from .families import Family, Slice, family_of_native, in_companion, to_diffusers
from .layout import Piece, is_packed
from .loader import (
    ATTACHMENT,
    CONFIG,
    NATIVE,
    assemble,
    file_metadata,
    outside_tensors,
    packed_weights,
    stored_tensors,
    swap_halves,
    swap_rows,
    taken,
)
from .ops import Operations
from .patches import adopt
from .settings import diffusers_settings

Progress = Callable[[Mapping[str, StoredLayer], int], None]
# Further tensors of ComfyUI's layers: the scale of 8-bit inputs, which decoded weights do not need, and factors of the inputs.
INPUT_SCALE, PRE_SCALE = "input_scale", "pre_quant_scale"
IN_BLOCKS = re.compile(r"\.\d+\.|\.net\.\d+$")  # matches names of modules in an nn.ModuleList of diffusers


def quantize_model(patcher: Any, config: QDiffConfig, progress: Progress = lambda done, total: None) -> Any:
    """A quantized copy of a MODEL. Layers are chosen, named and seeded as for diffusers.

    Args:
        patcher: any MODEL. LoRAs and merges on it are baked in; what ComfyUI has loaded quantized is decoded first.
        config: method and settings.
        progress: called before the first layer and after every one with the layers done and how many there will be; it may raise to
            interrupt.

    Raises:
        ConfigError: qdiff has quantized the model already, ComfyUI cannot decode it, or the settings leave no layer.
    """
    if packed_weights(patcher):
        raise ConfigError("this MODEL is quantized already; connect the one it was made from")
    record = Quantization(config)
    comfy.model_management.unload_all_models()  # removes patches from the weights, if they were baked in
    _check_sources(patcher.model.diffusion_model)
    weights = _weights(patcher)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    family = family_of_native(type(patcher.model).__name__, shapes)
    names = (
        to_diffusers(family.rules(shapes), shapes) if family else {k: [Slice(k, 0, s[0] if s else 1)] for k, s in shapes.items()}
    )
    targets = _choose(patcher.model.diffusion_model, names, record, family)
    if not targets:
        raise ConfigError("nothing to quantize: the settings leave every layer as it is")
    _check(targets, shapes, record, names, type(patcher.model).__name__)
    dtype = _computing_dtype(patcher.model)
    total = sum(_module_name(part) not in record.skipped for slices in targets.values() for part in slices)
    pieces: dict[str, list[Piece]] = {}
    progress(record.layers, total)
    for native, slices in targets.items():
        weight = _patched(patcher, native, weights[native], dtype)
        pieces[native] = []
        for part in slices:
            pieces[native].append(_piece(weight[part.start : part.stop], part, record, dtype))
            progress(record.layers, total)
    tensors = {key: pieces[key] if key in pieces else _patched(patcher, key, value, dtype) for key, value in weights.items()}
    state = {key: assemble(value, dtype) if isinstance(value, list) else value for key, value in tensors.items()}
    record.compute_dtype = dtype_name(dtype)
    record.provenance = new_provenance(family.classes[0] if family else type(patcher.model).__name__)
    return _rebuild(patcher, state, record, family, names)


def _module_name(part: Slice) -> str:
    """diffusers' name of the layer that this part of a weight belongs to."""
    return part.key.removesuffix(".weight")


def _weights(patcher: Any) -> dict[str, Tensor]:
    """The diffusion model's tensors; weights in ComfyUI's own quantized formats as they are, without their scales."""
    model = patcher.model.diffusion_model
    stored = model.state_dict()
    tensors = dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (INPUT_SCALE, PRE_SCALE)}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with a weight matrix, by name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kinds) or _is_linear(module))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or ComfyUI's replacement for one in a model with quantized layers."""
    stand_in = isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
    return isinstance(module, nn.Linear) or (stand_in and getattr(getattr(module, "weight", None), "ndim", 0) == 2)


def _check_sources(model: nn.Module) -> None:
    """Make sure that no layer holds codes of an unknown format. Warns of ComfyUI's own formats, whose decoding costs quality.

    Raises:
        ConfigError: names a layer of another format.
    """
    decoded: dict[str, int] = {}
    for name, module in _layers(model):
        weight: Any = module.weight
        if isinstance(weight, QuantizedTensor):
            decoded[weight._layout_cls] = decoded.get(weight._layout_cls, 0) + 1
            continue
        extra = {*module._parameters, *module._buffers} - {"weight", "bias", INPUT_SCALE, PRE_SCALE}
        if extra or (weight is not None and not weight.is_floating_point()):
            held = f"{', '.join(sorted(extra))} beside its weight" if extra else f"codes of the type {weight.dtype}"
            raise ConfigError(
                f"layer {name} of this MODEL is quantized in a way that this node cannot decode: it has {held}; connect the MODEL "
                "in 16 bits that it was made from"
            )
    if decoded:
        formats = ", ".join(f"{count} in {name.removesuffix('Layout')}" for name, count in decoded.items())
        logging.warning("qdiff: layers of this MODEL are quantized already (%s); the original in 16 bits would lose less", formats)


def _computing_dtype(model: Any) -> torch.dtype:
    """The dtype of the model, unless it is one of 8 bits, in which weights are only stored."""
    dtype = model.get_dtype()
    return dtype if dtype.itemsize > 1 else model.manual_cast_dtype or torch.bfloat16


def _patched(patcher: Any, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor, decoded, with the patches on it baked in."""
    weight = weight.detach()
    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    weight = weight.to(dtype) if weight.is_floating_point() and weight.dtype.itemsize == 1 else weight
    patches, factors = patcher.patches.get(f"diffusion_model.{key}"), _input_factors(patcher, key)
    if patches is None and factors is None:
        return weight
    device = comfy.model_management.get_torch_device()
    exact = weight.to(device, torch.float32, copy=True)
    exact = exact if patches is None else comfy.lora.calculate_weight(patches, exact, f"diffusion_model.{key}")
    exact = exact if factors is None else exact * factors.to(exact)
    return exact.to("cpu", weight.dtype)


def _input_factors(patcher: Any, key: str) -> Tensor | None:
    """Factors by which ComfyUI multiplies the inputs of the weight with this name, ``[columns]``."""
    name, _, leaf = key.rpartition(".")
    return getattr(patcher.model.diffusion_model.get_submodule(name), PRE_SCALE, None) if leaf == "weight" else None


def _choose(model: nn.Module, names: dict[str, list[Slice]], record: Quantization, family: Family | None) -> dict[str, list[Slice]]:
    """Weights to pack, each with the diffusers layers that it consists of; skipped layers are noted in ``record``."""
    out = {}
    keep = _kept_in_float32(family)
    for module_name, module in _layers(model):
        key = f"{module_name}.weight"
        if key not in names:
            continue
        chosen = False
        for part in names[key]:
            reason = _reason_to_skip(_module_name(part), module, record.config, keep)
            reason = "another component in diffusers" if in_companion(family, module_name) else reason
            if reason:
                record.skipped[_module_name(part)] = reason
            chosen = chosen or reason is None
        if chosen:
            out[key] = names[key]
    return out


def _check(
    targets: dict[str, list[Slice]], shapes: dict[str, Any], record: Quantization, names: dict[str, list[Slice]], where: str
) -> None:
    """Before any layer is quantized, refuse settings that cannot be applied, and warn of patterns without effect."""
    parts = {_module_name(part): (part.stop - part.start, *shapes[key][1:]) for key in targets for part in targets[key]}
    configs = {name: record.config_for(name) for name in parts if name not in record.skipped}
    check_layers({name: chosen for name, chosen in configs.items() if chosen is not None}, parts)
    modules = [_module_name(part) for parts_of_one in names.values() for part in parts_of_one]
    check_patterns(record.config, modules, modules, where)


def _reason_to_skip(name: str, module: nn.Module, config: QDiffConfig, keep: list[str]) -> str | None:
    """Why a layer is skipped, decided as in ``qdiff_diffusers.model.selection`` from diffusers' names and ComfyUI's modules."""
    chosen = config.config_for(name)
    if not (_is_linear(module) or isinstance(module, nn.Conv2d)) or not hasattr(module, "comfy_cast_weights"):
        return f"{type(module).__name__} is not a plain Linear or Conv2d"
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return "convolution with groups or unusual padding"
    if chosen is None:
        return "named in modules_to_not_convert or overrides"
    if any(part in name.split(".") for part in keep):
        return "kept in float32 by the model class"
    if config.keep_outer_layers and chosen is config and not IN_BLOCKS.search(name):
        return "outside the repeated blocks"
    return None


def _kept_in_float32(family: Family | None) -> list[str]:
    cls = getattr(diffusers, family.classes[0], None) if family else None
    return list(getattr(cls, "_keep_in_fp32_modules", None) or [])


def _piece(rows: Tensor, part: Slice, record: Quantization, dtype: torch.dtype) -> Piece:
    """Some rows of a weight as a piece of the packed one; quantized in diffusers' order of rows."""
    name, shape = _module_name(part), tuple(rows.shape)
    layer_config = record.config_for(name)
    if name in record.skipped or layer_config is None:
        return Piece(None, name, shape, {"weight": rows.to(dtype).cpu()}, part.swapped)
    original = swap_halves(rows) if part.swapped else rows.clone()
    stored, tensors = quantize_named(name, original.to(comfy.model_management.get_torch_device()), layer_config)
    record.layers[name] = stored
    values = stored_tensors(stored.spec, shape, lambda leaf: tensors[leaf].cpu())
    return Piece(stored.spec, name, shape, swap_rows(stored.spec, shape, values) if part.swapped else values, part.swapped)


def _rebuild(patcher: Any, tensors: dict[str, Tensor], record: Quantization, family: Family | None, names: dict[str, Any]) -> Any:
    """The same model around other tensors: ComfyUI's config of it, its sampling and its options are kept."""
    model_config = object.__new__(type(patcher.model.model_config))  # copy.copy stumbles over its __getattr__
    model_config.__dict__.update(patcher.model.model_config.__dict__)
    model_config.custom_operations = Operations
    model_config.quant_config = None
    if _computing_dtype(patcher.model) != patcher.model.get_dtype():
        model_config.set_inference_dtype(_computing_dtype(patcher.model), None)
    everything = tensors | outside_tensors(patcher.model)
    parts = (model_config, everything, patcher.model.model_sampling, patcher.load_device, patcher.offload_device)
    new = _patcher(*parts)
    if new.is_dynamic():  # a clone shares its tensors; some nodes ask for the model again without dynamic VRAM
        new.cached_patcher_init = (_patcher, parts)
    new.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    new.object_patches = dict(patcher.object_patches)
    shapes = {part.key: part.shape_of(tuple(tensors[key].shape)) for key, parts in names.items() for part in parts}
    settings = diffusers_settings(family, shapes, model_config) if family else None
    settings = settings or {NATIVE: type(patcher.model).__name__} | _untold(patcher.model.model_config, tensors)
    new.set_attachments(ATTACHMENT, {"settings": settings, "quantization": record, "path": ""})
    return new


def _untold(model_config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ComfyUI has read of the model from its file's metadata and cannot tell from its tensors, for our file."""
    plain = comfy.model_detection.detect_unet_config(dict(tensors), "") or {}
    given = {**model_config.unet_config, **type(model_config).unet_config}  # some drop or change what they were recognised by
    known = {key: value for key, value in given.items() if key not in model_config.unet_extra_config}
    told = {key: value for key, value in known.items() if _is_json(value) and plain.get(key) != value}
    if not told or comfy.model_detection.detect_unet_config(dict(tensors), "", metadata=file_metadata(told)) == plain:
        return {}
    return {CONFIG: told}


def _is_json(value: Any) -> bool:
    """Whether a value is one that a file's metadata can hold."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, bool | int | float | str) for item in values)


def _patcher(
    model_config: Any,
    tensors: dict[str, Tensor],
    sampling: Any,
    load_device: Any,
    offload_device: Any,
    disable_dynamic: bool = False,
) -> Any:
    """ComfyUI's model patcher around a new model with these tensors."""
    model = model_config.get_model(dict(tensors), "", device=None)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    new = kind(model, load_device=load_device, offload_device=offload_device)
    inside = {key: value for key, value in tensors.items() if key not in outside_tensors(model)}
    model.load_model_weights(inside, "", **({"assign": True} if new.is_dynamic() else {}))
    model.model_sampling = copy.deepcopy(sampling)
    return adopt(new)


def save_model(patcher: Any, folder: Path) -> Path:
    """Store a quantized MODEL so that the loader and diffusers' ``from_pretrained`` read it.

    Returns:
        The weight file, which is complete in itself.

    Raises:
        ConfigError: the model is not quantized by us, there are LoRAs on it, which would be lost, or ComfyUI would not recognise
            the file.
        CheckpointError: ``folder`` holds something already.
    """
    info = _saved_info(patcher)
    settings = {key: value for key, value in info["settings"].items() if key != "quantization_config"}
    return write_stored_model(folder, settings, info["quantization"], _stored(patcher))


def save_for_comfyui(patcher: Any, file: Path) -> Path:
    """Store a quantized MODEL as a file in ComfyUI's own formats, for its own loader of diffusion models.

    Raises:
        ConfigError: as for :func:`save_model`.
        CheckpointError: names the layers that no format of ComfyUI's holds exactly; nothing is written.
    """
    info = _saved_info(patcher)
    weights = _weights(patcher)
    family = family_of_native(type(patcher.model).__name__, {key: tuple(tensor.shape) for key, tensor in weights.items()})
    kept = {key: weight for key, weight in weights.items() if not (family and key in family.unused)}
    natives = {key: _pieces(key, weight) for key, weight in kept.items()}
    planned = plan(natives, is_measured=family.is_measured if family else lambda key: False)
    known = NATIVE not in info["settings"]
    return write(file, planned, described_model(info["settings"]) if known else {})


def _pieces(key: str, weight: Any) -> list[ExportPiece]:
    """The rows of one of ComfyUI's tensors, in its own order."""
    if not is_packed(weight):
        return [ExportPiece(key, None, TensorInfo(tuple(weight.shape), weight.dtype), lambda name: weight.detach())]

    def piece(block: Any) -> ExportPiece:
        tensors = block.tensors(weight._qdata)
        dense = block.spec is None
        dtype = tensors["weight"].dtype if dense else torch.float32
        name = f"{block.name}.weight" if dense else block.name
        return ExportPiece(name, block.spec, TensorInfo(block.shape, dtype), lambda leaf: tensors["weight" if dense else leaf])

    return [piece(block) for block in weight._params.blocks]


def _saved_info(patcher: Any) -> dict[str, Any]:
    """What is known of a MODEL that is to be saved.

    Raises:
        ConfigError: it is not quantized by us, there are LoRAs on it, which would be lost, or ComfyUI would not recognise the file.
    """
    info = patcher.get_attachment(ATTACHMENT)
    if info is None or not packed_weights(patcher):
        raise ConfigError(
            "this MODEL is not quantized by qdiff; connect one from Quantize Model (qdiff) or Load Quantized Model (qdiff)"
        )
    if patcher.patches:
        raise ConfigError("LoRAs and merges on a quantized MODEL cannot be saved into it; put them before Quantize Model (qdiff)")
    settings = info["settings"]
    if NATIVE in settings and comfy.model_detection.detect_unet_config(_weights(patcher), "") is None:
        raise ConfigError(
            f"{settings[NATIVE]} cannot be saved: ComfyUI recognises such a model only by names that its loaded tensors no longer "
            "have; quantize it in the graph each time"
        )
    return info


def _stored(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name that it is stored by."""
    weights = _weights(patcher)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    family = family_of_native(type(patcher.model).__name__, shapes)
    names = to_diffusers(family.rules(shapes) if family else [], shapes)
    yield from outside_tensors(patcher.model).items()
    for key, weight in weights.items():
        if family and key in family.unused:
            continue
        if is_packed(weight):
            yield from _unpack(weight)
            continue
        for part in names[key]:
            yield part.key, taken(weight, part)


def _unpack(weight: Any) -> Iterator[tuple[str, Tensor]]:
    for block in weight._params.blocks:
        values = block.tensors(weight._qdata)
        if block.spec is None:
            yield f"{block.name}.weight", (swap_halves(values["weight"]) if block.swapped else values["weight"]).clone()
            continue
        values = swap_rows(block.spec, block.shape, values) if block.swapped else values
        for leaf in block.spec.tensors(block.shape):
            yield f"{block.name}.{leaf}", values[leaf].clone()
