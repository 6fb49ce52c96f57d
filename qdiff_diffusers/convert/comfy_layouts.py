"""ComfyUI's own quantized formats, one object each: which of qdiff's layers a format holds, and how the numbers lie in it.

A weight goes from one program's tensors to the other's over :class:`Rows`, the same numbers in logical order: packing neither knows
how many layers are fused into one weight nor whose order the rows come in.

ComfyUI (``comfy/ops.py``) reads ``X.weight``, ``X.weight_scale`` and the like, and a JSON object in the bytes of ``X.comfy_quant``.
Its formats store what Comfy-Org's comfy-kitchen multiplies by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from qdiff_kernels import pack_bits, unpack_bits
from torch import Tensor

from ..formats import IntegerFormat, LayerSpec, MinifloatFormat, TensorInfo
from ..formats.regular import from_regular, negated_columns, regular_block, regular_signs, to_regular
from .packing_order import pad_to, rounded_up

FULL = "full_precision_matrix_mult"  # inputs stay in 16 bits, the weight is decoded
ROTATED, BLOCK = "convrot", "convrot_groupsize"
DEFAULT_BLOCK = 256  # of ConvRot, where the description names none
FLOATS = ("float16", "bfloat16", "float32")
NAN = 0x7F  # E4M3's, which qdiff's kernels read as the number of the code before it
TILE_ROWS, TILE_COLUMNS, TILE_PARTS = 128, 4, 4  # of the scales of blocks, as cuBLAS reads them


class Rows(NamedTuple):
    """A weight in logical order.

    Attributes:
        per_row: ``codes`` as int8 ``[rows, columns]``, one to an element, and what else each row has of its own.
        shared: what all rows of the weight share.
    """

    per_row: dict[str, Tensor]
    shared: dict[str, Tensor]

    def select(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        return Rows({name: tensor[start:stop] for name, tensor in self.per_row.items()}, self.shared)

    def swapped(self) -> Rows:
        """The two halves of the rows exchanged."""
        rows = len(next(iter(self.per_row.values())))
        return joined([self.select(rows // 2, rows), self.select(0, rows // 2)])


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several weights one after the other, whose shared tensors must be the same."""
    names = parts[0].per_row
    return Rows({name: torch.cat([part.per_row[name] for part in parts]) for name in names}, parts[0].shared)


class Layout(ABC):
    """One of ComfyUI's formats.

    Attributes:
        name: qdiff's name for it.
        format: ComfyUI's name for it.
        inputs: qdiff's activations that ComfyUI's way of quantizing inputs stands for.
        multiples: numbers that ComfyUI's weight must be multiples of, ``(rows, columns)``; it is padded to them.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    inputs: ClassVar[str]
    multiples: ClassVar[tuple[int, int]] = (1, 1)

    @abstractmethod
    def holds(self, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
        """Whether the weight of such a layer, its activations and extras left out, is a weight of this format, number by number."""

    @abstractmethod
    def infos(self, shape: tuple[int, int], shared: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        """What ComfyUI stores for a weight of ``shape``, by the ends of the tensors' names."""

    @abstractmethod
    def shared(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """:attr:`Rows.shared` of a layer of ours; of its tensors, those of :meth:`examined` are needed."""

    @abstractmethod
    def rows(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Rows:
        """A layer of ours in logical order."""

    @abstractmethod
    def pack(self, rows: Rows) -> dict[str, Tensor]:
        """The tensors of :meth:`infos`."""

    @abstractmethod
    def unpack(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Rows:
        """ComfyUI's weight, by the ends of its tensors' names, in logical order.

        Raises:
            ValueError: a tensor is missing or misshapen, or holds what no layer of ours can.
        """

    @abstractmethod
    def spec(self, settings: Mapping[str, Any], channels: int, scales: Sequence[TensorInfo]) -> LayerSpec:
        """The spec of a layer of ours of ``channels`` inputs; ``scales`` are those of ComfyUI's weights that it consists of.

        Raises:
            ValueError: the settings are not known.
        """

    @abstractmethod
    def store(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        """The tensors of :meth:`spec`, its extras included."""

    def examined(self, spec: LayerSpec) -> tuple[str, ...]:
        """Tensors that :meth:`shared` and :meth:`problem` look at."""
        return ()

    def problem(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> str | None:
        """Why the :meth:`examined` tensors of a layer that the format :meth:`holds` do not fit; ``None`` if they do."""
        return None

    def settings(self, spec: LayerSpec, columns: int, fast: bool) -> dict[str, Any]:
        """ComfyUI's description of a layer: with inputs in 16 bits where ours are, unless it is to be ``fast``."""
        out: dict[str, Any] = {"format": self.format}
        return out if fast or spec.activations != "none" else out | {FULL: True}

    def takes_inputs(self, spec: LayerSpec) -> bool:
        """Whether ComfyUI can treat the inputs as the layer does."""
        return spec.activations in ("none", self.inputs) and not spec.input_scales


def is_one_scale(scale: Any) -> bool:
    """Whether a minifloat or integer format has one real scale per row or tensor."""
    return scale.group_size in ("row", "tensor") and scale.scale_dtype in FLOATS and not getattr(scale, "tensor_scale", False)


def minifloat_codes(spec: LayerSpec, columns: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes of a minifloat format, int8 ``[rows, columns]``; E4M3's without the one that elsewhere is NaN."""
    assert isinstance(spec.format, MinifloatFormat)
    codes = unpack_bits(tensors["codes"], spec.format.bits, columns).to(torch.uint8).view(torch.int8)
    return codes - ((codes & NAN) == NAN).to(torch.int8) if spec.format.encodings == ("e4m3",) else codes


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor of one byte per element as int8, which unlike float8 can be indexed, joined and padded."""
    return tensor.view(torch.int8)


class Float8(Layout):
    """E4M3 with one float32 scale."""

    name, format, inputs = "fp8", "float8_e4m3fn", "fp8"
    weight = MinifloatFormat(("e4m3",), "tensor", "float32")

    def holds(self, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
        fmt = spec.format
        return isinstance(fmt, MinifloatFormat) and fmt.encodings == ("e4m3",) and is_one_scale(fmt) and fmt.group_size == "tensor"

    def infos(self, shape: tuple[int, int], shared: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        out = {"weight": TensorInfo(shape, torch.float8_e4m3fn), "weight_scale": TensorInfo((), torch.float32)}
        return out | ({"input_scale": TensorInfo((), torch.float32)} if "input_scale" in shared else {})

    def takes_inputs(self, spec: LayerSpec) -> bool:
        return spec.activations in ("none", self.inputs) and spec.input_scales <= 1

    def examined(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("scales", "input_scales") if spec.input_scales else ("scales",)

    def shared(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {"scale": tensors["scales"].float().reshape(())}
        return out | ({"input_scale": tensors["input_scales"].float().reshape(())} if spec.input_scales else {})

    def rows(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Rows:
        return Rows({"codes": minifloat_codes(spec, shape[1], tensors)}, self.shared(spec, tensors))

    def pack(self, rows: Rows) -> dict[str, Tensor]:
        out = {"weight": rows.per_row["codes"].view(torch.float8_e4m3fn), "weight_scale": rows.shared["scale"]}
        return out | ({"input_scale": rows.shared["input_scale"]} if "input_scale" in rows.shared else {})

    def unpack(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Rows:
        codes = bytes_of(checked(tensors, "weight", shape, torch.float8_e4m3fn))
        refuse_nan(codes)
        scale = tensors.get("weight_scale", torch.ones((), dtype=torch.float32)).float()
        if scale.numel() not in (1, shape[0]):
            raise ValueError(f"its scale has shape {list(scale.shape)}")
        shared = {"scale": scale.reshape(())} if scale.numel() == 1 else {}
        return Rows({"codes": codes, "scales": scale.reshape(-1, 1).expand(shape[0], 1)}, shared)

    def spec(self, settings: Mapping[str, Any], channels: int, scales: Sequence[TensorInfo]) -> LayerSpec:
        return LayerSpec(self.weight if _is_one(scales) else MinifloatFormat(("e4m3",), "row", "float32"))

    def store(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        out = {name: value.contiguous() for name, value in joined(rows).per_row.items()}
        return out | ({"scales": rows[0].shared["scale"].reshape(1, 1)} if len(rows) == 1 and rows[0].shared else {})


class BlockScaled(Layout):
    """Minifloats with a scale for each block of a row, which the tiles of :func:`tiled` hold."""

    weight: ClassVar[MinifloatFormat]
    scale_dtype: ClassVar[torch.dtype]  # in ComfyUI's file

    def holds(self, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
        return spec.format == self.weight

    def infos(self, shape: tuple[int, int], shared: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        rows, columns = self._padded(shape)
        width = columns * self.weight.bits // 8
        dtype = torch.uint8 if self.weight.bits == 4 else torch.float8_e4m3fn
        scales = (rounded_up(rows, TILE_ROWS), rounded_up(columns // self._block, TILE_COLUMNS))
        return {"weight": TensorInfo((rows, width), dtype), "weight_scale": TensorInfo(scales, self.scale_dtype)}

    @property
    def _block(self) -> int:
        assert isinstance(self.weight.group_size, int)
        return self.weight.group_size

    def _padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (rounded_up(size, multiple) for size, multiple in zip(shape, self.multiples, strict=True))
        return rows, columns

    def shared(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def rows(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Rows:
        codes = minifloat_codes(spec, shape[1], tensors)
        return Rows({"codes": codes, "scales": bytes_of(tensors["scales"])}, self.shared(spec, tensors))

    def pack(self, rows: Rows) -> dict[str, Tensor]:
        codes, scales = rows.per_row["codes"], rows.per_row["scales"]
        padded = self._padded((codes.shape[0], codes.shape[1]))
        codes = pad_to(codes, padded)
        scales = pad_to(scales, (padded[0], padded[1] // self._block))
        if self.weight.bits == 4:  # the even column in the high half of the byte
            data = ((codes[:, 0::2] << 4) | codes[:, 1::2]).view(torch.uint8)
        else:
            data = codes.view(torch.float8_e4m3fn)
        return {"weight": data, "weight_scale": tiled(scales).view(self.scale_dtype)}

    def unpack(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Rows:
        infos, padded = self.infos(shape, {}), self._padded(shape)
        data = bytes_of(checked(tensors, "weight", *infos["weight"]))
        if self.weight.bits == 4:
            codes = torch.stack([(data >> 4) & 15, data & 15], 2).flatten(1)
        else:
            codes = data
            refuse_nan(codes)
        stored = tensors.get("weight_scale")
        if stored is None or stored.dtype.itemsize != 1 or tuple(stored.shape) != infos["weight_scale"].shape:
            found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"its weight_scale is {found}, it should be {infos['weight_scale']}")
        scales = untiled(bytes_of(stored), padded[0], padded[1] // self._block)
        columns = -(-shape[1] // self._block)
        return Rows({"codes": codes[: shape[0], : shape[1]], "scales": scales[: shape[0], :columns]}, self._second(tensors))

    def _second(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def store(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        all_rows = joined(rows).per_row
        scales = all_rows["scales"].contiguous()
        stored = scales.view(torch.float8_e4m3fn) if self.weight.scale_dtype == "e4m3" else scales
        return {"codes": pack_bits(all_rows["codes"].view(torch.uint8), self.weight.bits), "scales": stored}


class Nvfp4(BlockScaled):
    """E2M1 with E4M3 scales of 16 weights, and a float32 scale above them."""

    name, format, inputs = "nvfp4", "nvfp4", "nvfp4"
    weight = MinifloatFormat(("e2m1",), 16, "e4m3", tensor_scale=True)
    scale_dtype = torch.float8_e4m3fn
    multiples = (16, 16)

    def infos(self, shape: tuple[int, int], shared: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        return super().infos(shape, shared) | {"weight_scale_2": TensorInfo((), torch.float32)}

    def examined(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("tensor_scale",)

    def shared(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scale": tensors["tensor_scale"].float().reshape(())}

    def pack(self, rows: Rows) -> dict[str, Tensor]:
        return super().pack(rows) | {"weight_scale_2": rows.shared["scale"]}

    def _second(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "weight_scale_2" not in tensors or tensors["weight_scale_2"].numel() != 1:
            raise ValueError("it has no weight_scale_2 of one number")
        return {"scale": tensors["weight_scale_2"].float().reshape(1)}

    def spec(self, settings: Mapping[str, Any], channels: int, scales: Sequence[TensorInfo]) -> LayerSpec:
        return LayerSpec(self.weight if len(scales) == 1 else MinifloatFormat(("e2m1",), 16, "e4m3", tensor_scale="row"))

    def store(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        if len(rows) == 1:
            return super().store(rows) | {"tensor_scale": rows[0].shared["scale"]}
        scales = [part.shared["scale"].expand(len(part.per_row["codes"])) for part in rows]
        return super().store(rows) | {"tensor_scale": torch.cat(scales)[:, None]}


class Mxfp8(BlockScaled):
    """E4M3 with a power of two for each 32 weights."""

    name, format, inputs = "mxfp8", "mxfp8", "fp8"
    weight = MinifloatFormat(("e4m3",), 32, "e8m0")
    scale_dtype = torch.uint8
    multiples = (32, 32)

    def spec(self, settings: Mapping[str, Any], channels: int, scales: Sequence[TensorInfo]) -> LayerSpec:
        return LayerSpec(self.weight)


class RowScaled(Layout):
    """Signed integers with a float32 scale per row, perhaps of a weight that a regular Hadamard matrix has rotated."""

    bits: ClassVar[int]
    minifloat: ClassVar[str]  # the encoding of the same integers, the most negative one left out
    is_rotated: ClassVar[bool]

    def holds(self, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
        fmt, block = spec.format, spec.rotation
        if not isinstance(fmt, IntegerFormat | MinifloatFormat) or not is_one_scale(fmt):
            return False
        integers = fmt.bits == self.bits and fmt.symmetric if isinstance(fmt, IntegerFormat) else fmt.encodings == (self.minifloat,)
        even = self.bits == 8 or shape[1] % 64 == 0  # ComfyUI's four-bit products take 64 columns at a time
        rotated = spec.smooth and bool(block) and regular_block(block) == block
        return integers and even and (rotated if self.is_rotated else not (spec.smooth or block))

    def examined(self, spec: LayerSpec) -> tuple[str, ...]:
        if not self.is_rotated:
            return ()
        return ("smooth", "codes") if isinstance(spec.format, IntegerFormat) else ("smooth",)

    def problem(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> str | None:
        if not self.is_rotated:
            return None
        if not torch.equal(tensors["smooth"].float().cpu(), regular_signs(shape[1], spec.rotation)):
            return "its inputs are smoothed, and rotated by other matrices than ConvRot's"
        if isinstance(spec.format, IntegerFormat):
            lowest = unpack_bits(tensors["codes"], self.bits, shape[1]) == 0
            if bool(lowest[:, negated_columns(shape[1], spec.rotation)].any()):
                return f"its codes are down to -{1 << (self.bits - 1)}, which ConvRot's order of columns would negate"
        return None

    def infos(self, shape: tuple[int, int], shared: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        rows, columns = shape
        scales = (rows, 1) if self.bits == 8 else (rows,)
        return {
            "weight": TensorInfo((rows, columns * self.bits // 8), torch.int8),
            "weight_scale": TensorInfo(scales, torch.float32),
        }

    def shared(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def rows(self, spec: LayerSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Rows:
        codes, scales = unpack_bits(tensors["codes"], self.bits, shape[1]), tensors["scales"].float()
        half = 1 << (self.bits - 1)
        if isinstance(spec.format, IntegerFormat):
            codes = codes - half
        else:
            assert isinstance(spec.format, MinifloatFormat)
            codes = torch.where(codes < half, codes, half - codes)
            scales = scales * spec.format.levels()[0][1]
        codes = codes.to(torch.int8)
        codes = to_regular(codes, spec.rotation) if spec.rotation else codes
        return Rows({"codes": codes, "scales": scales.expand(shape[0], 1)}, {})

    def pack(self, rows: Rows) -> dict[str, Tensor]:
        codes, scales = rows.per_row["codes"], rows.per_row["scales"].contiguous()
        if self.bits == 8:
            return {"weight": codes, "weight_scale": scales}
        return {"weight": (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4), "weight_scale": scales[:, 0]}

    def settings(self, spec: LayerSpec, columns: int, fast: bool) -> dict[str, Any]:
        rotated = {ROTATED: True} if self.is_rotated and self.bits == 8 else {}
        return super().settings(spec, columns, fast) | rotated | ({BLOCK: spec.rotation} if self.is_rotated else {})

    def unpack(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Rows:
        data = checked(tensors, "weight", *self.infos(shape, {})["weight"])
        if "weight_scale" not in tensors or tensors["weight_scale"].numel() not in (1, shape[0]):
            raise ValueError("it has no weight_scale of one number, or one for each row")
        codes = data if self.bits == 8 else torch.stack([(data << 4) >> 4, data >> 4], 2).flatten(1)
        if block := self._block(settings):
            lowest = (codes == -(1 << (self.bits - 1))).to(torch.int8)
            if bool((from_regular(lowest, block) < 0).any()):
                raise ValueError(f"a code of -{1 << (self.bits - 1)} stands where qdiff's order of columns would negate it")
            codes = from_regular(codes, block)
        scales = tensors["weight_scale"].float().reshape(-1, 1).expand(shape[0], 1)
        smooth = {"smooth": regular_signs(shape[1], block).half()} if block else {}
        return Rows({"codes": codes, "scales": scales}, smooth)

    def _block(self, settings: Mapping[str, Any]) -> int:
        """Block of the rotation; 0 for none."""
        more = settings.get("params") if isinstance(settings.get("params"), dict) else {}
        given = {**(more or {}), **settings}
        return int(given.get(BLOCK, DEFAULT_BLOCK)) if self.is_rotated else 0

    def spec(self, settings: Mapping[str, Any], channels: int, scales: Sequence[TensorInfo]) -> LayerSpec:
        block = self._block(settings)
        if block and (regular_block(block) != block or channels % block):
            raise ValueError(f"it is rotated in blocks of {block}, no power of four up to 256 that divides {channels} columns")
        activations = "none" if settings.get(FULL) else self.inputs  # ComfyUI quantizes them on every device
        return LayerSpec(self.weight, rotation=block, smooth=bool(block), activations=activations)

    @property
    def weight(self) -> IntegerFormat:
        """What weights are read as."""
        return IntegerFormat(self.bits, "row", scale_dtype="float32")

    def store(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        all_rows = joined(rows)
        return self.weight.pack(all_rows.per_row["codes"], all_rows.per_row["scales"]) | all_rows.shared


class Int8(RowScaled):
    """INT8 with a scale per row."""

    name, format, inputs = "int8", "int8_tensorwise", "int8"
    bits, minifloat, is_rotated = 8, "e1m6", False


class Int8Rotated(RowScaled):
    """INT8 ConvRot: the same of a rotated weight."""

    name, format, inputs = "int8_convrot", "int8_tensorwise", "int8"
    bits, minifloat, is_rotated = 8, "e1m6", True


class Int4Rotated(RowScaled):
    """INT4 ConvRot."""

    name, format, inputs = "convrot_w4a4", "convrot_w4a4", "int4"
    bits, minifloat, is_rotated = 4, "e1m2", True


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Float8(), Int8(), Int8Rotated(), Nvfp4(), Mxfp8(), Int4Rotated())}


def layout_for(spec: LayerSpec, shape: tuple[int, ...]) -> Layout:
    """The format that holds a layer of ours exactly.

    Raises:
        ValueError: there is none, and why.
    """
    if len(shape) != 2:
        raise ValueError("is a convolution, and ComfyUI quantizes linear layers only")
    if spec.rank:
        raise ValueError(f"has a low-rank branch of rank {spec.rank}")
    if spec.shift:
        raise ValueError("shifts its inputs")
    found = next((layout for layout in LAYOUTS.values() if layout.holds(spec, shape)), None)
    rotated = isinstance(found, RowScaled) and found.is_rotated
    if found is None or ((spec.rotation or spec.smooth) and not rotated):
        raise ValueError(f"is {spec.describe()}")
    if not found.takes_inputs(spec):
        raise ValueError(f"has {spec.describe().rpartition(', ')[2]}, where ComfyUI's {found.format} has {found.inputs} or 16 bits")
    return found


def layout_of(settings: Mapping[str, Any]) -> Layout:
    """The format that one of ComfyUI's descriptions names.

    Raises:
        ValueError: it is not known.
    """
    more = settings.get("params")
    rotated = bool(settings.get(ROTATED, more.get(ROTATED) if isinstance(more, dict) else False))
    for layout in LAYOUTS.values():
        same = layout.format == settings.get("format")
        if same and not (layout.format == Int8.format and rotated != (layout.name == Int8Rotated.name)):
            return layout
    known = ", ".join(dict.fromkeys(layout.format for layout in LAYOUTS.values()))
    raise ValueError(f"is in ComfyUI's format {settings.get('format')}; {known} can be read")


def _is_one(scales: Sequence[TensorInfo]) -> bool:
    """Whether there is one scale in all."""
    return len(scales) == 1 and math.prod(scales[0].shape) == 1


def tiled(scales: Tensor) -> Tensor:
    """Scales of blocks ``[rows, blocks]`` in the order of matrix units, filled up with zeros to ``[128 n, 4 m]``.

    Tiles of 128 x 4 follow each other; in each, rows 0, 32, 64 and 96 stand side by side.
    """
    rows, columns = (rounded_up(size, tile) for size, tile in zip(scales.shape, (TILE_ROWS, TILE_COLUMNS), strict=True))
    axes = pad_to(scales, (rows, columns)).view(-1, TILE_PARTS, TILE_ROWS // TILE_PARTS, columns // TILE_COLUMNS, TILE_COLUMNS)
    return axes.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def untiled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`tiled`, for the first ``rows`` and ``columns``."""
    tiles = stored.shape[1] // TILE_COLUMNS
    axes = stored.reshape(-1, tiles, TILE_ROWS // TILE_PARTS, TILE_PARTS, TILE_COLUMNS)
    return axes.permute(0, 3, 2, 1, 4).reshape(stored.shape)[:rows, :columns]


def checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a file, which must be of this shape and dtype.

    Raises:
        ValueError: it is not.
    """
    found = tensors[name]
    if tuple(found.shape) != shape or found.dtype != dtype:
        raise ValueError(f"its {name} is {TensorInfo(tuple(found.shape), found.dtype)}, it should be {TensorInfo(shape, dtype)}")
    return found


def refuse_nan(codes: Tensor) -> None:
    """Refuse E4M3 codes that are no numbers, with a ``ValueError``."""
    if bool(((codes & NAN) == NAN).any()):
        raise ValueError("it holds NaN, which no weight of ours is")
