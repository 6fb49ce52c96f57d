"""Black Forest Labs' quantized files: E4M3 weights with a float32 scale per row or tensor, and NVFP4 weights. ComfyUI's E4M3 files
are the same under other names.

Their static activation scales (``input_scale``) are for matrix units that quantize inputs too; here inputs stay in 16 bits, as they
do in diffusers on devices without such units.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.source_weights import MARKER, comfy_formats
from ..checkpoint.stand_ins import Piece, StandIn
from ..config import FPConfig, QDiffConfig
from ..errors import CheckpointError, ConfigError
from ..formats import MinifloatFormat, TensorInfo, WeightFormat
from ..formats.layer_table import StoredLayer
from .nunchaku_folder import Advance
from .single_file import convert_single_file
from .stream import Source

SCALE, SECOND = ".weight_scale", ".weight_scale_2"
COMFY_SCALE, COMFY_FORMAT = ".scale_weight", ".comfy_quant"
IGNORED = (".input_scale", ".scale_input", COMFY_FORMAT, SECOND)
NVFP4_GROUP = 16
E4M3_NAN = 0x7F


class BflFile:
    """One of Black Forest Labs' files, whose quantized weights are read on demand.

    Raises:
        CheckpointError: the file has no quantized weight, or one without scales, of an unknown dtype, or misshapen.
    """

    def __init__(self, path: Path) -> None:
        self._source = Source([path])
        infos = self._source.infos
        self._scale_names = {n.removesuffix(s): n for n in infos for s in (SCALE, COMFY_SCALE) if n.endswith(s)}
        self._layers = {layer: infos[name] for layer, name in self._scale_names.items()}
        if not self._layers:
            raise CheckpointError(f"{path} has no ...{SCALE} tensors, so it is no FP8 or NVFP4 file of this kind")
        for layer, kind in comfy_formats(infos, self._source.get_all, self._source.metadata, str(path)).items():
            if kind != "float8_e4m3fn":
                raise CheckpointError(
                    f"{layer}.weight is in ComfyUI's format {kind}, which `qdiff convert comfy` reads; of its formats only "
                    "float8_e4m3fn can be read here"
                )
        self.nvfp4 = {layer: f"{layer}{SECOND}" in infos for layer in self._layers}
        self.tensors: dict[str, Tensor] = {}
        for name, info in infos.items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in self._layers:
                self.tensors[name] = self._stand_in(layer, info)
            elif not name.endswith(IGNORED) and name not in self._scale_names.values() and name.rpartition(".")[2] != MARKER:
                if info.dtype.itemsize == 1:
                    raise CheckpointError(f"tensor {name} is {info.dtype}, but there is no {layer}{SCALE} for it")
                self.tensors[name] = self._source.get(name)
        if lost := [layer for layer in self._layers if f"{layer}.weight" not in infos]:
            raise CheckpointError(f"the file lacks {lost[0]}.weight; it is incomplete")

    def _stand_in(self, layer: str, info: TensorInfo) -> StandIn:
        rows = info.shape[0] if len(info.shape) == 2 else 0
        columns = info.shape[1] * (2 if self.nvfp4[layer] else 1) if rows else 0
        wanted = torch.uint8 if self.nvfp4[layer] else torch.float8_e4m3fn
        if info.dtype != wanted or not rows:
            kind = "NVFP4" if self.nvfp4[layer] else "FP8"
            raise CheckpointError(f"{layer}.weight is {info.dtype} {list(info.shape)}; {kind} weights are {wanted} matrices")
        scales, shapes = self._layers[layer], [(), (1,), (rows,), (rows, 1)]
        if self.nvfp4[layer]:
            shapes = [(rows, columns // NVFP4_GROUP)]
        if scales.shape not in shapes or (self.nvfp4[layer] and scales.dtype != torch.float8_e4m3fn):
            raise CheckpointError(
                f"{self._scale_names[layer]} is {scales.dtype} {list(scales.shape)}, which does not fit {rows} x {columns} weights"
            )
        return StandIn.of([Piece(f"{layer}.weight", 0, rows)], columns)

    def format(self, pieces: list[Piece]) -> WeightFormat:
        layers = [piece.name.removesuffix(".weight") for piece in pieces]
        if len({self.nvfp4[layer] for layer in layers}) > 1:
            raise CheckpointError(f"one layer of the model would be made of FP8 and NVFP4 rows: {', '.join(layers)}")
        if self.nvfp4[layers[0]]:
            return MinifloatFormat(("e2m1",), NVFP4_GROUP, "e4m3", True if len(set(layers)) == 1 else "row")
        return MinifloatFormat(("e4m3",), "row", "float32")

    def store(self, pieces: list[Piece], columns: int) -> dict[str, Tensor]:
        fmt = self.format(pieces)
        assert isinstance(fmt, MinifloatFormat)
        weights = torch.cat([self._rows(piece) for piece in pieces])
        if self.nvfp4[pieces[0].name.removesuffix(".weight")]:
            scales = torch.cat([self._scales(piece).view(torch.int8) for piece in pieces]).view(torch.float8_e4m3fn)
            return {"codes": weights, "scales": scales, "tensor_scale": self._second(pieces, fmt)}
        if ((weights & E4M3_NAN) == E4M3_NAN).any():
            raise CheckpointError(f"{pieces[0].name} holds NaN, which no weight of ours is")
        scales = torch.cat([self._scales(piece).float().reshape(-1, 1) for piece in pieces])
        return {"codes": weights, "scales": scales}

    def _rows(self, piece: Piece) -> Tensor:
        """Packed codes of some rows: NVFP4 two to a byte, the even one in the low nibble, as qdiff has them; FP8 one to a byte."""
        return self._source.get(piece.name).view(torch.int8)[piece.start : piece.stop]

    def _scales(self, piece: Piece, suffix: str = SCALE) -> Tensor:
        layer = piece.name.removesuffix(".weight")
        scales = self._source.get(self._scale_names[layer] if suffix == SCALE else layer + suffix)
        if scales.numel() == 1:
            return scales.reshape(1).expand(piece.stop - piece.start)
        return scales[piece.start : piece.stop]

    def _second(self, pieces: list[Piece], fmt: MinifloatFormat) -> Tensor:
        if fmt.tensor_scale != "row":
            return self._source.get(pieces[0].name.removesuffix(".weight") + SECOND).float().reshape(1)
        return torch.cat([self._scales(piece, SECOND).float() for piece in pieces]).reshape(-1, 1)


def convert_bfl(
    source: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write one of Black Forest Labs' FP8 or NVFP4 files as a qdiff checkpoint: every code and scale stays as it is.

    Arguments and errors as for :func:`qdiff_diffusers.convert.convert_gguf`.
    """
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")

    def settings(layers: dict[str, StoredLayer]) -> QDiffConfig:
        four_bits = any(getattr(layer.spec.format, "bits", 8) == 4 for layer in layers.values())
        return FPConfig(weight_format="nvfp4" if four_bits else "e4m3")  # type: ignore[call-arg]

    return convert_single_file(BflFile(path), path, Path(output_dir), settings, config, overwrite, advance)
