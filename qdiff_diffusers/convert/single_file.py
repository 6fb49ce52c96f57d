"""Quantized single files of other programs: their layers under diffusers' names, with diffusers' own converters.

Those converters rename tensors, and cut and join them along their rows. A :class:`StandIn` for a quantized tensor takes part in
that, so that no weight has to be read, let alone decoded, before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.folders import CONFIG, check_output, written_at_once
from ..checkpoint.stand_ins import Piece, StandIn
from ..config import FORMAT_VERSION, QDiffConfig
from ..errors import CheckpointError, ConfigError
from ..formats import LayerSpec, TensorInfo, WeightFormat
from ..formats.layer_table import StoredLayer
from ..layers import unsupported_reason
from .importing import described, skeleton
from .nunchaku_folder import WEIGHTS, Advance, counted, read_config
from .stream import stored_bytes, write_file


class QuantizedFile(Protocol):
    """A file whose quantized weights can be stored in qdiff's formats exactly."""

    tensors: dict[str, Tensor]  # dense tensors, and a StandIn for each quantized weight

    def format(self, pieces: list[Piece]) -> WeightFormat | LayerSpec:
        """qdiff's format, or spec, for these rows. Raises CheckpointError if they cannot be one layer."""
        ...

    def store(self, pieces: list[Piece], columns: int) -> dict[str, Tensor]:
        """The tensors of :meth:`format` for these rows."""
        ...


def spec_of(opened: QuantizedFile, pieces: list[Piece]) -> LayerSpec:
    """qdiff's spec for these rows."""
    found = opened.format(pieces)
    return found if isinstance(found, LayerSpec) else LayerSpec(found)


class Contents(NamedTuple):
    """The model that a file becomes: its packed layers and its other tensors."""

    packed: dict[str, StandIn]  # by module
    dense: dict[str, Tensor | StandIn]  # by tensor; quantized ones are decoded
    layers: dict[str, StoredLayer]
    infos: dict[str, TensorInfo]


def convert_single_file(
    opened: QuantizedFile,
    source: Path,
    output_dir: Path,
    settings: Callable[[dict[str, StoredLayer]], QDiffConfig],
    config: str | Path | None,
    overwrite: bool,
    advance: Advance | None,
) -> Path:
    """Write what ``opened`` holds as a model folder; see the importers for arguments and errors."""
    check_output(output_dir, overwrite, source, config)
    if config is None:
        raise ConfigError(f"{source.name} carries no config of its model; give the dense model's folder with --config")
    model_config = read_config(Path(config))
    model = skeleton(model_config)
    contents = plan(model, model_config, opened)
    return write_model(contents, opened, model, model_config, source, output_dir, settings, overwrite, advance, config)


def write_model(
    contents: Contents,
    opened: QuantizedFile,
    model: nn.Module,
    model_config: dict[str, Any],
    source: Path,
    output_dir: Path,
    settings: Callable[[dict[str, StoredLayer]], QDiffConfig],
    overwrite: bool,
    advance: Advance | None,
    *sources: Any,
) -> Path:
    """Write the model that ``opened`` becomes as a folder, which appears only once it is complete."""
    quantization = described(settings(contents.layers), model, contents.layers, source.name)
    with written_at_once(output_dir, overwrite, source, *sources, nbytes=stored_bytes(contents.infos)) as folder:
        kept = {key: value for key, value in model_config.items() if key != "quantization_config"}
        (folder / CONFIG).write_text(json.dumps(kept | {"quantization_config": quantization.to_dict()}, indent=2) + "\n")
        tensors = counted(_everything(contents, opened), len(contents.infos), advance)
        write_file(folder / WEIGHTS, contents.infos, tensors, {"format": "pt", "qdiff_format_version": str(FORMAT_VERSION)})
    return output_dir


def plan(model: nn.Module, config: dict[str, Any], opened: QuantizedFile, found: dict[str, Tensor] | None = None) -> Contents:
    """Give every tensor of the model its place in the file; ``found``: the file's tensors, if they have diffusers' names by now.

    Raises:
        CheckpointError: a tensor is missing, misshapen or left over, or cannot be stored exactly.
    """
    found = diffusers_names(model, config, opened.tensors) if found is None else found
    expected = model.state_dict()
    if lost := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"the file lacks {', '.join(lost[:5])}; it is incomplete, or of another model than the config")
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"the file holds {', '.join(extra[:5])}, which {type(model).__name__} has no place for")
    out = Contents({}, {}, {}, {})
    for name, tensor in found.items():
        module, _, leaf = name.rpartition(".")
        if tuple(tensor.shape) != tuple(expected[name].shape):
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, the model needs {list(expected[name].shape)}")
        if isinstance(tensor, StandIn) and leaf == "weight" and unsupported_reason(model.get_submodule(module)) is None:
            shape = tuple(tensor.shape)
            out.packed[module] = tensor
            out.layers[module] = StoredLayer(spec_of(opened, tensor.pieces), shape, None)
            out.infos.update({f"{module}.{key}": info for key, info in out.layers[module].spec.tensors(shape).items()})
        else:
            out.dense[name] = tensor
    if not out.packed:
        raise CheckpointError("the file holds no quantized weight of this model")
    for name, tensor in out.dense.items():
        dtype = torch.float32 if isinstance(tensor, StandIn) else tensor.dtype
        out.infos[name] = TensorInfo(tuple(tensor.shape), dtype)
    return out


def diffusers_names(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names."""
    if tensors.keys() >= model.state_dict().keys():
        return dict(tensors)
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(type(model).__name__)
    if known is None:
        raise CheckpointError(
            f"diffusers has no converter for single files of {type(model).__name__}, and the names are not its own"
        )
    try:
        converted: dict[str, Tensor] = known["checkpoint_mapping_fn"](config=config, checkpoint=dict(tensors))
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the file does not hold the tensors of a {type(model).__name__} ({type(error).__name__}: {error}); it is incomplete, "
            "or of another model than the config"
        ) from error
    return converted


def _everything(contents: Contents, opened: QuantizedFile) -> Iterator[tuple[str, Tensor]]:
    for module, stand_in in contents.packed.items():
        for leaf, tensor in opened.store(stand_in.pieces, stand_in.shape[1]).items():
            yield f"{module}.{leaf}", tensor
    for name, tensor in contents.dense.items():
        if isinstance(tensor, StandIn):
            shape = tuple(tensor.shape)
            yield name, spec_of(opened, tensor.pieces).dequantize(opened.store(tensor.pieces, shape[1]), shape)
        else:
            yield name, tensor
