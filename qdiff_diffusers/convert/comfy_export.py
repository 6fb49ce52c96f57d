"""``qdiff convert to-comfy``: a quantized model as one file under ComfyUI's names and in its formats, for its own loader.

Everything is decided, and what has no place refused, from headers and small tensors before the file is begun; then it is written
weight by weight.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.comfy_pack import families, native_family
from ..checkpoint.inspect import inspect_components
from ..checkpoint.source_weights import COMFY
from ..checkpoint.stored_model import StoredModel, read_stored_model
from ..checkpoint.writing import written_file
from ..errors import CheckpointError, ConfigError
from ..formats import LayerSpec, TensorInfo
from .comfy_layouts import LAYOUTS, Layout, Rows, joined, layout_for
from .importing import skeleton
from .nunchaku_folder import Advance, counted
from .stream import Source, write_file

WEIGHT = ".weight"
LISTED = 4  # names, and reasons, that a message lists
MODEL = "qdiff_model"  # key of diffusers' config.json in the file's metadata, for those who read the file again


class Piece(NamedTuple):
    """Rows of one of ComfyUI's tensors: a tensor, or the weight of a layer, of ours.

    Attributes:
        name: of the tensor, or of the packed layer.
        spec: of the packed layer, ``None`` for a tensor.
        info: shape and dtype of the tensor; of a packed layer, the logical shape counts.
        get: reads a tensor of a packed layer by its leaf, or the tensor.
        swapped: whether ComfyUI has the halves of its rows exchanged.
    """

    name: str
    spec: LayerSpec | None
    info: TensorInfo
    get: Callable[[str], Tensor]
    swapped: bool = False

    def examined(self, layout: Layout) -> dict[str, Tensor]:
        """The tensors that tell whether the layer's numbers fit."""
        assert self.spec is not None
        return {leaf: self.get(leaf) for leaf in layout.examined(self.spec)}

    def rows(self, layout: Layout | None) -> Rows:
        """The rows in logical order, in the layout's terms."""
        if self.spec is None or layout is None:
            rows = Rows({"": self.get(self.name)}, {})
        else:
            leaves = self.spec.tensors(self.info.shape)
            rows = layout.rows(self.spec, self.info.shape, {leaf: self.get(leaf) for leaf in leaves})
        return rows.swapped() if self.swapped else rows


class Planned(NamedTuple):
    """One of ComfyUI's tensors: what it consists of, its layout (``None``: as it is), its description there, and what is stored."""

    pieces: Sequence[Piece]
    layout: Layout | None
    settings: dict[str, Any]
    infos: dict[str, TensorInfo]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Name and value of everything that is stored, in the order of ``infos``."""
        parts = [piece.rows(self.layout) for piece in self.pieces]
        if self.layout is None:
            yield name, parts[0].per_row[""] if len(parts) == 1 else joined(parts).per_row[""]
            return
        module = name.removesuffix(WEIGHT)
        packed = self.layout.pack(joined(parts))
        packed[COMFY] = _description(self.settings)
        yield from ((key, packed[key.removeprefix(f"{module}.")]) for key in self.infos)


class Problems:
    """Layers that have no place in a file of ComfyUI's, by what is wrong with them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, reason: str) -> None:
        """Note a layer; ``reason`` goes on from its name."""
        self._names[reason].append(name)

    def check(self) -> None:
        """Raise one :class:`CheckpointError` about all layers, if there are any."""
        if not self._names:
            return
        count = sum(map(len, self._names.values()))
        reasons = sorted(self._names.items(), key=lambda item: -len(item[1]))
        told = [f"{_some(names)} {reason}" for reason, names in reasons[:LISTED]]
        told += [f"{len(reasons) - LISTED} more reasons"] if len(reasons) > LISTED else []
        raise CheckpointError(
            f"{count} layers have no exact place in a file of ComfyUI's: {'; '.join(told)}. Quantize the model with "
            f"`qdiff quantize --for comfyui:nvfp4`, or another of {', '.join(LAYOUTS)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def plan(
    natives: Mapping[str, Sequence[Piece]],
    fast: bool = False,
    tables: Collection[str] = (),
    is_measured: Callable[[str], bool] = lambda key: False,
) -> dict[str, Planned]:
    """What to write of each of ComfyUI's tensors.

    Args:
        natives: ComfyUI's tensors by name, each with the pieces that follow each other in it.
        fast: let ComfyUI quantize the inputs of all layers, also of those that have them in 16 bits here.
        tables: names of packed layers that are token tables.
        is_measured: whether the shape of one of ComfyUI's tensors tells it what model it has.

    Raises:
        CheckpointError: names the layers that no format of ComfyUI's holds exactly.
    """
    problems, out = Problems(), {}
    for key, pieces in natives.items():
        if all(piece.spec is None for piece in pieces):
            shapes = [piece.info.shape for piece in pieces]
            shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
            out[key] = Planned(pieces, None, {}, {key: TensorInfo(shape, pieces[0].info.dtype)})
        elif planned := _plan_packed(key, pieces, fast, tables, problems):
            out[key] = planned
            shape = (sum(piece.info.shape[0] for piece in pieces), *pieces[0].info.shape[1:])
            if planned.infos[key].shape != shape and is_measured(key):
                problems.add(
                    ", ".join(piece.name for piece in pieces),
                    f"would have another shape in {planned.settings['format']}, and by it ComfyUI tells what model it has",
                )
    problems.check()
    if not any(planned.layout for planned in out.values()):
        raise CheckpointError("the model has no packed layer")
    return out


def _plan_packed(key: str, pieces: Sequence[Piece], fast: bool, tables: Collection[str], problems: Problems) -> Planned | None:
    """One of ComfyUI's weights of packed layers; ``None`` if there is a problem with it."""
    layouts = []
    for piece in pieces:
        if piece.spec is None:
            problems.add(piece.name.removesuffix(WEIGHT), "is not quantized, but ComfyUI fuses it with a layer that is")
            continue
        try:
            layout = layout_for(piece.spec, piece.info.shape)
        except ValueError as error:
            problems.add(piece.name, str(error))
            continue
        reason = layout.problem(piece.spec, piece.info.shape, piece.examined(layout))
        if piece.name in tables:
            reason = "is a token table, and ComfyUI quantizes linear layers only"
        if reason:
            problems.add(piece.name, f"does not fit: {reason}")
        else:
            layouts.append(layout)
    if len(layouts) < len(pieces):
        return None
    if reason := _cannot_join(pieces, layouts[0]):
        problems.add(", ".join(piece.name for piece in pieces), reason)
        return None
    first, layout = pieces[0], layouts[0]
    assert first.spec is not None
    shape = (sum(piece.info.shape[0] for piece in pieces), first.info.shape[1])
    settings = layout.settings(first.spec, shape[1], fast)
    module = key.removesuffix(WEIGHT)
    infos = layout.infos(shape, layout.shared(first.spec, first.examined(layout)))
    infos[COMFY] = TensorInfo(tuple(_description(settings).shape), torch.uint8)
    return Planned(pieces, layout, settings, {f"{module}.{leaf}": info for leaf, info in infos.items()})


def _cannot_join(pieces: Sequence[Piece], layout: Layout) -> str | None:
    """Why layers cannot be one weight of ComfyUI's; ``None`` if they can."""
    specs = [piece.spec for piece in pieces if piece.spec is not None]
    if len(set(specs)) > 1:
        return "are one weight in ComfyUI, and have different formats"
    shared = [layout.shared(piece.spec, piece.examined(layout)) for piece in pieces if piece.spec is not None]
    for name, value in shared[0].items():
        if not all(torch.equal(other[name], value) for other in shared[1:]):
            return f"are one weight in ComfyUI, with one {name.replace('_', ' ')}, and have different ones"
    return None


def _description(settings: Mapping[str, Any]) -> Tensor:
    """JSON as ComfyUI keeps it in a file: the bytes of the text."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def write(path: Path, planned: Mapping[str, Planned], metadata: dict[str, str], advance: Advance | None = None) -> Path:
    """Write a plan as a safetensors file, which appears only once it is complete."""
    infos = {name: info for one in planned.values() for name, info in one.infos.items()}
    tensors = (pair for key, one in planned.items() for pair in one.tensors(key))
    with written_file(path) as part:
        write_file(part, infos, counted(tensors, len(infos), advance), {"format": "pt"} | metadata)
    return path


def stored_pieces(stored: StoredModel, family: Any) -> dict[str, list[Piece]]:
    """ComfyUI's tensors of a stored model, each with the pieces that it consists of; nothing is read yet.

    Raises:
        CheckpointError: a part of a fused layer is missing.
    """
    source, layers = Source(stored.files), stored.quantization.layers
    packed = {f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.spec.tensors(layer.shape)}
    keys = [key for key in stored.tensors if key not in packed] + [f"{name}{WEIGHT}" for name in layers]
    try:
        natives = families().to_native(family.rules(keys), keys)
    except families().MissingPart as error:
        raise CheckpointError(f"{stored.path.name} is incomplete: {error}") from error

    def piece(key: str, swapped: bool) -> Piece:
        name = key.removesuffix(WEIGHT)
        if name not in layers or not key.endswith(WEIGHT):
            return Piece(key, None, stored.tensors[key], source.get, swapped)
        spec, shape, _ = layers[name]
        info = TensorInfo(tuple(shape), torch.float32)
        return Piece(name, spec, info, lambda leaf: source.get(f"{name}.{leaf}"), swapped)

    return {native: [piece(part.key, part.swapped) for part in parts] for native, parts in natives.items()}


def export_comfy(
    source: str | Path,
    path: str | Path,
    *,
    fast: bool = False,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write a quantized model as one file that ComfyUI's own loader of diffusion models reads, every code and scale as it is.

    Layers that are packed become weights in ComfyUI's formats, see docs/comfyui.md; everything else stays as it is stored.

    Args:
        source: folder of a quantized model, or of a pipeline with one; a file that the ComfyUI nodes saved; or a Hub name.
        path: the ``.safetensors`` file to write, which appears only once it is complete.
        fast: let ComfyUI quantize the inputs of all layers, also of those that have them in 16 bits here.
        overwrite: replace a file that is there.
        advance: called with (tensors written, tensors in all, name) after each tensor.

    Raises:
        ConfigError: ComfyUI has no native class for the model, or ``path`` is no file that can be written.
        CheckpointError: ``source`` is no quantized model, or has layers that no format of ComfyUI's holds exactly.
    """
    path = Path(path)
    check_file(path, overwrite, source)
    stored = _find(source)
    family = native_family(stored.model_class)
    modules = dict(skeleton(stored.settings).named_modules())
    tables = {name for name in stored.quantization.layers if isinstance(modules.get(name), nn.Embedding)}
    return write(
        path, plan(stored_pieces(stored, family), fast, tables, family.is_measured), described_model(stored.settings), advance
    )


def described_model(settings: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a file: diffusers' config.json of a model, without what it says of quantization."""
    return {MODEL: json.dumps({key: value for key, value in settings.items() if key != "quantization_config"})}


def check_file(path: Path, overwrite: bool, *sources: str | Path) -> None:
    """Make sure that a file can be written, before there is anything to write.

    Raises:
        ConfigError: says why not.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} must be a file whose name ends in .safetensors")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the file to write")
    if any(Path(source).exists() and path.exists() and path.samefile(source) for source in sources):
        raise ConfigError(f"{path} is the source itself, which is not overwritten; choose another name")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; choose another name, or overwrite it")
    if path.parent.exists() and not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is a file; choose a folder for {path.name}")


def _find(source: str | Path) -> StoredModel:
    """The quantized model at ``source``: of a pipeline, the only one that ComfyUI runs as a diffusion model."""
    if Path(source).is_file():
        return read_stored_model(source)
    stored = [read_stored_model(info.folder) for info in inspect_components(source)]
    native = [model for model in stored if families().family_of_class(model.model_class)] or stored
    if len(native) > 1:
        names = ", ".join(model.path.name for model in native)
        raise ConfigError(f"{source} has several quantized models, {names}; give the folder of one")
    return native[0]
