"""From a stored checkpoint to a native ComfyUI MODEL."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from qdiff_diffusers.checkpoint.files import read_json, weight_files
from qdiff_diffusers.checkpoint.stored_model import StoredModel, read_stored_model, stored_settings
from qdiff_diffusers.errors import CheckpointError

from .families import FAMILIES, Companion, Family, MissingPart, Part, Slice, family_of_class, family_of_native, to_native
from .layout import Piece, is_packed, make_weight
from .ops import Operations
from .patches import adopt

# Key in a file's settings: the class of ComfyUI's that its tensors are for, where diffusers' config cannot be told from them. Those
# of a family that we know have diffusers' names all the same, as the parts of fused layers have no others.
NATIVE = "comfyui_class"
# What ComfyUI cannot tell from the tensors and has read from the metadata of the file that the model came from.
CONFIG = "comfyui_config"
ATTACHMENT = "qdiff"
# What ComfyUI's classes of audio models keep outside the diffusion model, and the name that it has in files.
OUTSIDE = {
    "seconds_start_embedder": "conditioner.conditioners.seconds_start",
    "seconds_total_embedder": "conditioner.conditioners.seconds_total",
    "padding_embedding": "conditioner.conditioners.prompt.padding_embedding",
}


def load_model(path: str | Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> Any:
    """A MODEL whose packed layers stay packed.

    Args:
        path: model folder or self-contained file.
        dtype: dtype of everything that is not packed, and of computing; by default the checkpoint's.
        disable_dynamic: switch dynamic VRAM off, as for ComfyUI's own loaders.

    Raises:
        CheckpointError: this is no qdiff checkpoint, is damaged, or is a model that ComfyUI has no native class for.
    """
    stored = read_stored_model(path)
    family = stored_family(stored)
    dtype = dtype or computing_dtype(stored)
    beside = companions(stored, family)
    tensors = native_tensors(stored, family, stored.load(), dtype)
    for companion, folder in beside:
        tensors |= companion_tensors(companion, folder, dtype)
    config = native_config(stored, family, {companion.folder: read_json(folder / "config.json") for companion, folder in beside})
    patcher = native_model(tensors, dtype, family, disable_dynamic, config)
    patcher.cached_patcher_init = (load_model, (path, dtype))
    patcher.set_attachments(ATTACHMENT, {"settings": stored.settings, "quantization": stored.quantization, "path": str(path)})
    return patcher


def computing_dtype(stored: StoredModel) -> torch.dtype:
    """The dtype that a checkpoint's model computes in."""
    dtype: torch.dtype = getattr(torch, stored.quantization.compute_dtype or "bfloat16")
    return dtype


def stored_family(stored: StoredModel) -> Family | None:
    """The family of a checkpoint, ``None`` if its tensors have ComfyUI's names already.

    Raises:
        CheckpointError: ComfyUI has no native class for this model.
    """
    if NATIVE in stored.settings:
        return family_of_native(stored.settings[NATIVE], stored.tensors)
    if family := family_of_class(stored.model_class):
        return family
    if is_text_encoder(stored):
        raise CheckpointError(
            f"{stored.path.name} is the text encoder {stored.model_class}; load it with Load Quantized CLIP (qdiff)"
        )
    raise CheckpointError(
        f"{stored.path.name} is a {stored.model_class or 'model without a class name'}, which ComfyUI has no native class for. "
        f"Native are {', '.join(f.name for f in FAMILIES)}; everything else runs in the qdiff pipeline nodes"
    )


def is_text_encoder(stored: StoredModel) -> bool:
    """Whether a stored model is a text encoder, saved by transformers."""
    return "architectures" in stored.settings


def native_tensors(
    stored: StoredModel, family: Family | Companion | None, tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A checkpoint's tensors under ComfyUI's names, packed weights as ``QuantizedTensor``.

    Raises:
        CheckpointError: a part of a fused layer is missing.
    """
    layers = stored.quantization.layers
    packed = {f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.spec.tensors(layer.shape)}
    keys = [key for key in tensors if key not in packed] + [f"{name}.weight" for name in layers]
    try:
        parts = to_native(family.rules(keys), keys) if family else {key: [Part(key)] for key in keys}
    except MissingPart as error:
        raise CheckpointError(f"{stored.path.name} is incomplete: {error}") from error

    # What ComfyUI itself has kept in another dtype than it computes in has to stay so: frequencies of rotations, for one.
    cast = {computing_dtype(stored)} if NATIVE in stored.settings else {t.dtype for t in tensors.values() if t.is_floating_point()}

    def piece(part: Part) -> Piece:
        name = part.key.removesuffix(".weight")
        if name not in layers:
            value = tensors[part.key]
            value = placed(value.to(dtype) if value.dtype in cast else value, part)
            return Piece(None, name, tuple(value.shape), {"weight": value}, part.swapped)
        spec, shape, _ = layers[name]
        values = stored_tensors(spec, shape, lambda leaf: tensors[f"{name}.{leaf}"])
        return Piece(spec, name, shape, swap_rows(spec, shape, values) if part.swapped else values, part.swapped)

    computed = family.computed(stored.settings) if family and NATIVE not in stored.settings else {}
    return computed | {native: assemble([piece(part) for part in sources], dtype) for native, sources in parts.items()}


def placed(tensor: Tensor, part: Part) -> Tensor:
    """A diffusers tensor as it lies in ComfyUI's."""
    tensor = tensor.reshape(part.shape) if part.shape else tensor
    return swap_halves(tensor) if part.swapped else tensor


def taken(tensor: Tensor, part: Slice) -> Tensor:
    """A diffusers tensor out of ComfyUI's; the inverse of :func:`placed`."""
    rows = tensor[part.start : part.stop] if tensor.ndim else tensor
    rows = swap_halves(rows) if part.swapped else rows.clone()
    return rows.reshape(part.shape) if part.shape else rows


def stored_tensors(spec: Any, shape: tuple[int, ...], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A packed layer's tensors by name, with the codebooks that it shares with others."""
    from qdiff_diffusers.formats import codebook_table

    values = {leaf: get(leaf) for leaf in spec.tensors(shape)}
    table = getattr(spec.format, "table", None)
    return values | ({"codebooks": codebook_table(table)} if table else {})


def swap_rows(spec: Any, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed layer's tensors with the two halves of its rows exchanged."""
    rows = spec.row_tensors(shape)
    return {leaf: swap_halves(value) if leaf in rows else value for leaf, value in tensors.items()}


def assemble(pieces: list[Piece], dtype: torch.dtype) -> Tensor:
    """One of ComfyUI's tensors from its pieces: packed if any of them is."""
    if any(piece.spec for piece in pieces):
        return make_weight(pieces, dtype)
    # Copied out of the mapped file, where alignment is accidental: BLAS rounds differently by it, and a file cannot be replaced.
    return torch.cat([piece.tensors["weight"] for piece in pieces]) if pieces[0].shape else pieces[0].tensors["weight"].clone()


def swap_halves(tensor: Tensor) -> Tensor:
    """The rows of a tensor, second half first."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def companions(stored: StoredModel, family: Family | None) -> list[tuple[Companion, Path]]:
    """The components that ComfyUI's model contains besides this one, each with its folder beside the checkpoint's.

    Raises:
        CheckpointError: names the one that is not there.
    """
    if family is None or NATIVE in stored.settings:  # what ComfyUI has saved is complete
        return []
    found = []
    for companion in family.beside:
        folder = stored.path.parent / companion.folder
        if stored.path.is_file() and not folder.is_dir():
            folder = stored.path.parent.parent / companion.folder
        if (folder / "config.json").is_file():
            found.append((companion, folder))
        elif companion.required:
            raise CheckpointError(
                f"{stored.path.name} is {family.name}, whose model in ComfyUI contains the pipeline's component {companion.folder} "
                f"too; put its folder beside it, as {folder}"
            )
    return found


def companion_tensors(companion: Companion, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ComfyUI's model contains of a component, under ComfyUI's names; the component may be quantized or not.

    Raises:
        CheckpointError: the component is damaged.
    """
    if stored_settings(folder):
        stored = read_stored_model(folder)
        tensors = native_tensors(stored, companion, stored.load(), dtype)
        return {key: value for key, value in tensors.items() if key not in stored.tensors}
    given: dict[str, Tensor] = {}
    for file in weight_files(folder):
        given |= comfy.utils.load_torch_file(str(file), safe_load=True)
    parts = to_native(companion.rules(given), given)
    return {key: given[part.key].to(dtype) for key, (part,) in parts.items() if key != part.key}


def native_config(stored: StoredModel, family: Family | None, beside: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI has to be told of a model besides its tensors; ``beside``: settings of its companions, by folder."""
    if NATIVE in stored.settings:
        return dict(stored.settings.get(CONFIG, {}))
    return family.told({**stored.settings, **beside}) if family else {}


def file_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file that tells ComfyUI so."""
    return {"config": json.dumps({"transformer": dict(config)})}


def native_model(
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    family: Family | None,
    disable_dynamic: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """ComfyUI's model patcher around a model with these tensors.

    Args:
        config: what it cannot tell from them; see :func:`native_config`.

    Raises:
        CheckpointError: this ComfyUI does not recognise the model, or recognises another one in it.
    """
    name = family.name if family else "this model"
    options = {"custom_operations": Operations, "dtype": dtype}
    supported = inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    extra: dict[str, Any] = {"disable_dynamic": disable_dynamic} if "disable_dynamic" in supported else {}
    extra |= {"metadata": file_metadata(config)} if config else {}
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options=options, **extra)
    except (KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"this ComfyUI could not build {name} from the checkpoint: {error}") from error
    if patcher is None:
        raise CheckpointError(f"this ComfyUI does not recognise {name} in the checkpoint; a newer one may")
    found = type(patcher.model).__name__
    if family and found not in family.native:
        raise CheckpointError(f"this ComfyUI takes {name} for {found}; a newer one may know it")
    _check_names(patcher.model, tensors, family.unused if family else ())
    return adopt(patcher)


def _check_names(model: Any, tensors: Mapping[str, Tensor], unused: tuple[str, ...]) -> None:
    """Refuse missing and unknown tensors, which ComfyUI only logs before it runs with random numbers."""
    wanted = set(model.diffusion_model.state_dict()) - set(unused)
    given = set(model.model_config.process_unet_state_dict(dict(tensors))) - set(unused) - outside_tensors(model).keys()
    if lost := sorted(wanted - given):
        raise CheckpointError(f"the checkpoint lacks {', '.join(lost[:5])} of ComfyUI's {type(model).__name__}; it is incomplete")
    if unknown := sorted(given - wanted):
        raise CheckpointError(f"the checkpoint has {', '.join(unknown[:5])}, which ComfyUI's {type(model).__name__} has not")


def outside_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of one of ComfyUI's models that are not in its diffusion model, under their names in files."""
    out: dict[str, Tensor] = {}
    for attribute, name in OUTSIDE.items():
        value = getattr(model, attribute, None)
        if isinstance(value, torch.nn.Module):
            out |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        elif value is not None:
            out[name] = value.detach()
    return out


def packed_weights(model: Any) -> dict[str, Any]:
    """The packed weights of a MODEL by the name of their module."""
    modules = model.model.diffusion_model.named_modules()
    return {name: module.weight for name, module in modules if is_packed(getattr(module, "weight", None))}
