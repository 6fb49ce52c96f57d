"""``qdiff convert comfy``: files in ComfyUI's own quantized formats as qdiff models. Nothing is quantized again.

Names are those of the node pack's tables, so every family that ComfyUI runs natively can be read, whether diffusers has a converter
for its single files or not.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.comfy_pack import families, native_family
from ..checkpoint.folders import check_output
from ..checkpoint.source_weights import COMFY, MARKER, OF_INPUTS, comfy_settings
from ..checkpoint.stand_ins import Piece, StandIn
from ..config import FPConfig, QDiffConfig, SVDQuantConfig
from ..errors import CheckpointError, ConfigError
from ..formats import IntegerFormat, LayerSpec, MinifloatFormat, TensorInfo
from ..formats.layer_table import StoredLayer
from .comfy_export import MODEL, WEIGHT
from .comfy_layouts import Float8, Layout, Rows, joined, layout_of
from .importing import skeleton
from .nunchaku_folder import Advance, read_config
from .single_file import plan, write_model
from .stream import Source

PREFIX = "model.diffusion_model."  # of the diffusion model's tensors in files with text encoders and VAE
SCALES = {"weight_scale": "weight_scale", "weight_scale_2": "weight_scale_2", "scale_weight": "weight_scale"}
SMOOTHED = "pre_quant_scale"


class ComfyFile:
    """One of ComfyUI's files, whose quantized weights are read on demand.

    Args:
        path: of the file.
        model: the model that it holds, on the meta device.

    Raises:
        ConfigError: ComfyUI has no native class for the model.
        CheckpointError: a weight is in an unknown format, or damaged.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.family = native_family(type(model).__name__)
        self._source, self._path = Source([path]), path
        whole = any(name.startswith(PREFIX) for name in self._source.infos)
        self._prefix = PREFIX if whole else ""
        infos = {name.removeprefix(self._prefix): i for name, i in self._source.infos.items() if name.startswith(self._prefix)}
        self.infos: dict[str, TensorInfo] = infos
        self._settings = self._described()
        self._layouts = {layer: self._layout(layer) for layer in self._settings}
        self._shapes = self._logical_shapes(model)
        self._weight = lru_cache(maxsize=1)(self._read)  # the parts of a fused weight come one after the other
        self.tensors: dict[str, Tensor] = {}
        for name, info in infos.items():
            layer, _, leaf = name.rpartition(".")
            if name == f"{layer}{WEIGHT}" and layer in self._layouts:
                rows, columns = self._shapes[layer]
                self.tensors[name] = StandIn.of([Piece(layer, 0, rows)], columns)
            elif leaf not in (*SCALES, *OF_INPUTS, COMFY, MARKER) and name not in self.family.unused:
                value = self._source.get(self._prefix + name)
                small = info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
                self.tensors[name] = value.to(torch.bfloat16) if small else value

    def _described(self) -> dict[str, dict[str, Any]]:
        """The settings of every quantized layer, those of ``scaled_fp8`` files and of plain float8 weights among them."""
        read = self._source.get_all
        found = comfy_settings(self._source.infos, read, self._source.metadata, str(self._path))
        out = {name.removeprefix(self._prefix): settings for name, settings in found.items()}
        for name, info in self.infos.items():
            layer = name.removesuffix(WEIGHT)
            if layer != name and len(info.shape) == 2 and info.dtype == torch.float8_e4m3fn:
                out.setdefault(layer, {"format": Float8.format})
            if name.endswith(f".{SMOOTHED}"):
                raise CheckpointError(f"{name} of {self._path} multiplies inputs, which none of our layers does")
        if lost := [layer for layer in out if f"{layer}{WEIGHT}" not in self.infos]:
            raise CheckpointError(f"{self._path} describes {lost[0]}, but lacks its weight; it is incomplete")
        if not out:
            raise CheckpointError(f"{self._path} holds no weight in a quantized format of ComfyUI's")
        return out

    def _layout(self, layer: str) -> Layout:
        try:
            return layout_of(self._settings[layer])
        except ValueError as error:
            raise CheckpointError(f"{layer}{WEIGHT} of {self._path} {error}") from error

    def _logical_shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Shapes of the quantized weights as the model has them: ComfyUI pads some, and packs numbers."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        natives = families().to_native(self.family.rules(shapes), shapes)
        out = {}
        for layer in self._settings:
            parts = [shapes[part.key] for part in natives.get(f"{layer}{WEIGHT}", ())]
            if not parts or len(parts[0]) != 2:
                raise CheckpointError(f"{self._path} holds {layer}{WEIGHT}, which {type(model).__name__} has no place for")
            out[layer] = (sum(shape[0] for shape in parts), parts[0][1])
        return out

    def under_our_names(self) -> dict[str, Tensor]:
        """The tensors by diffusers' names; quantized ones are stand-ins for rows."""
        shapes = {name: self._shapes.get(name.removesuffix(WEIGHT), tuple(t.shape)) for name, t in self.tensors.items()}
        slices = families().to_diffusers(self.family.rules(shapes), shapes)
        out: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            for part in slices[name]:
                rows = tensor[part.start : part.stop] if tensor.ndim else tensor
                middle = (part.stop - part.start + 1) // 2
                out[part.key] = torch.cat([rows[middle:], rows[:middle]]) if part.swapped else rows
        return out

    def format(self, pieces: list[Piece]) -> LayerSpec:
        layers = list(dict.fromkeys(piece.name for piece in pieces))
        layout, settings = self._layouts[layers[0]], self._settings[layers[0]]
        if any(self._layouts[layer] is not layout or self._settings[layer] != settings for layer in layers):
            raise CheckpointError(f"one layer of the model would be made of rows in different formats: {', '.join(layers)}")
        try:
            return layout.spec(settings, self._shapes[layers[0]][1], [self._scale(layer) for layer in layers])
        except ValueError as error:
            raise CheckpointError(f"{layers[0]}{WEIGHT} of {self._path}: {error}") from error

    def _scale(self, layer: str) -> TensorInfo:
        """Of the layer's scales, or of the one that a plain float8 weight stands for."""
        names = [f"{layer}.{leaf}" for leaf in SCALES if f"{layer}.{leaf}" in self.infos]
        return self.infos[names[0]] if names else TensorInfo((), torch.float32)

    def store(self, pieces: list[Piece], columns: int) -> dict[str, Tensor]:
        rows: dict[str, list[Rows]] = {}
        for piece in pieces:
            rows.setdefault(piece.name, []).append(self._weight(piece.name).select(piece.start, piece.stop))
        return self._layouts[pieces[0].name].store([joined(parts) for parts in rows.values()])

    def _read(self, layer: str) -> Rows:
        names = {leaf: f"{layer}.{leaf}" for leaf in ("weight", *SCALES) if f"{layer}.{leaf}" in self.infos}
        tensors = {SCALES.get(leaf, leaf): self._source.get(self._prefix + name) for leaf, name in names.items()}
        try:
            return self._layouts[layer].unpack(self._settings[layer], tensors, self._shapes[layer])
        except ValueError as error:
            raise CheckpointError(f"{layer}{WEIGHT} of {self._path}: {error}") from error


def convert_comfy(
    source: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write one of ComfyUI's quantized files as a qdiff checkpoint: every code and scale stays as it is.

    Arguments and errors as for :func:`qdiff_diffusers.convert.convert_gguf`; files of :func:`export_comfy` need no ``config``.
    """
    path, folder = Path(source), Path(output_dir)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")
    check_output(folder, overwrite, path, config)
    model_config = _config(path) if config is None else read_config(Path(config))
    model = skeleton(model_config)
    opened = ComfyFile(path, model)
    contents = plan(model, model_config, opened, opened.under_our_names())
    return write_model(contents, opened, model, model_config, path, folder, _settings, overwrite, advance, config)


def _config(path: Path) -> Any:
    try:
        return json.loads(Source([path]).metadata[MODEL])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path.name} carries no config of its model; give the dense model's folder with --config") from error


def _settings(layers: dict[str, StoredLayer]) -> QDiffConfig:
    """The settings that describe a file best."""
    formats = [layer.spec.format for layer in layers.values()]
    most = max(formats, key=formats.count)
    if isinstance(most, IntegerFormat):
        return SVDQuantConfig(weight_format=f"int{most.bits}", group_size="row", rank=0)  # type: ignore[call-arg]
    assert isinstance(most, MinifloatFormat)
    name = "nvfp4" if most.bits == 4 else "mxfp8" if most.scale_dtype == "e8m0" else "e4m3"
    return FPConfig(weight_format=name)  # type: ignore[call-arg]
