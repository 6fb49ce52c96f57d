"""Reading a checkpoint that is to be quantized: 8-bit weights with their scales, and tensors that are no weights.

A weight in 8 bits is ``numbers * scale``. The scale lies beside it in a tensor of its own, one number for the tensor, for each row
or for each block of 128 x 128; ComfyUI, DeepSeek, Black Forest Labs, bitsandbytes and compressed-tensors name it differently. A
float8 weight without a scale was only cast: its numbers are the weight. Every other way of storing weights in few bits is refused
by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats import TensorInfo, dtype_name
from .files import read_header
from .pages import release_pages
from .stand_ins import StandIn

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 128
BITSANDBYTES_UNIT = 127  # bitsandbytes' SCB is the largest absolute value of a row
# Names of scales: those that go with any tensor end it, those of a module's weight stand beside it.
SUFFIXES = ("_scale", "_scale_inv")
BESIDE = ("scale_weight", "SCB")
LEAVES = ("weight_scale", "weight_scale_inv", *BESIDE)
OF_INPUTS = ("scale_input", "input_scale", "activation_scale")  # not used: inputs stay in 16 bits
MARKER, COMFY, COMFY_METADATA = "scaled_fp8", "comfy_quant", "_quantization_metadata"
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
COMFY_HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")
OF_COMFY = "read it with `qdiff convert comfy`, or start from the model in 16 or 32 bits"
START = "start from the model in 16 or 32 bits"
# Names of tensors by which other formats are recognised: the format, tensors that must all be there, and what to do instead.
FOREIGN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("qdiff's", (r"\.codes",), "load its folder, whose config.json says how to read it"),
    ("bitsandbytes' 4-bit", (r"\.weight\.(absmax|quant_map|quant_state\..+)",), START),
    ("Nunchaku's", (r"\.qweight", r"\.wscales"), "read it with `qdiff convert nunchaku`"),
    ("GPTQ's or AWQ's", (r"\.qweight",), START),
    ("NVFP4", (r"\.weight_(scale_2|global_scale)",), "read it with `qdiff convert bfl` or `qdiff convert comfy`, or " + START),
    ("MXFP4", (r"_blocks", r"_scales"), START),
    ("compressed-tensors' packed", (r"\.weight_packed",), START),
    ("quanto's", (r"\.weight\._data",), START),
    ("torchao's", (r"[.:_](weight_)?qdata",), START),
    ("HQQ's", (r"\.W_q",), START),
    ("SDNQ's", (r"\.svd_(up|down)",), START),
    ("ModelOpt's smoothed", (r"\.pre_quant_scale",), START),
)
# Further tensors beside a weight that change its meaning.
MEANINGFUL = ("scale", "scales", "zero_point", "zeros", "svd_up", "svd_down", "smooth", "weight_shape", "g_idx", "lut")
Read = Callable[[list[str]], Mapping[str, Tensor]]  # tensors of a checkpoint by name


class Rows(NamedTuple):
    """Rows ``start .. stop - 1`` of an 8-bit weight.

    Attributes:
        name: name of the weight in the file.
        numbers: the whole weight, or a slice of safetensors, which is not read yet.
        shape: shape of the whole weight.
        scale: float32, one number for the tensor, for each row or for each block; ``None`` if the numbers are the weight.
    """

    name: str
    numbers: Any
    shape: tuple[int, ...]
    scale: Tensor | None
    start: int
    stop: int

    def decode(self, device: torch.device | str = "cpu") -> Tensor:
        """The weights, float32.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        out = self.numbers[self.start : self.stop].to(device).float()
        if self.scale is not None:
            out = out * expand_scale(self.scale.to(device), self.shape, self.start, self.stop)
        if not out.isfinite().all():
            raise CheckpointError(f"{self.name} holds NaN or infinity; the checkpoint is damaged")
        return out


class EightBit(StandIn):
    """An 8-bit weight that is decoded when it is needed; a converter may cut and join its rows before."""

    pieces: list[Rows]

    def decode(self, device: torch.device | str = "cpu") -> Tensor:
        """The weight, float32; see :meth:`Rows.decode`."""
        parts = [rows.decode(device) for rows in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stored(self) -> list[Tensor]:
        """The rows that it consists of, as they are stored."""
        return [rows.numbers[rows.start : rows.stop] for rows in self.pieces]

    @classmethod
    def other(cls, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*_decoded(args), **_decoded(kwargs))


class EightBitSlice:
    """An 8-bit weight as transformers reads one: as a whole, by ``[...]``, when it is needed."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def get_shape(self) -> list[int]:
        return list(self.rows.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        return self.rows.decode()[index]


class ReadSlice:
    """A slice of safetensors that remembers what was read of it."""

    def __init__(self, numbers: Any, read: list[Tensor]) -> None:
        self.numbers, self.read = numbers, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.numbers, name)

    def __getitem__(self, index: Any) -> Tensor:
        out: Tensor = self.numbers[index]
        self.read.append(out)
        return out


def _decoded(value: Any) -> Any:
    if isinstance(value, EightBit):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return type(value)(map(_decoded, value)) if type(value) in (list, tuple) else value


def expand_scale(scale: Tensor, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """A scale as float32 that multiplies rows ``start .. stop - 1`` of a weight of this shape; see :func:`_check_scale`."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() == shape[0]:
        return scale.reshape(-1, *(1 for _ in shape[1:]))[start:stop]
    rows = scale.repeat_interleave(BLOCK, 0)[start:stop]
    return rows.repeat_interleave(BLOCK, 1)[:, : shape[1]]


class SourceWeights:
    """The tensors of a checkpoint: which are 8-bit weights, and which only belong to them.

    Attributes:
        infos: shapes and dtypes of all tensors.
        companions: names of the tensors that are none of the model's: scales, markers, descriptions.

    Raises:
        CheckpointError: weights are stored in an unknown format, or a scale is missing or does not fit.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        read: Read,
        metadata: Mapping[str, str] | None = None,
        where: str = "the checkpoint",
    ) -> None:
        self.infos, self.where = infos, where
        self._check_foreign()
        scales = {name: scale for name in infos if (scale := self._scale_of(name)) is not None}
        self._check_alone(scales)
        self.companions = set(scales.values()) | {name for name in infos if self._is_companion(name, scales)}
        formats = self._comfy_formats(read, metadata or {})
        for name, scale in scales.items():
            _check_scale(name, infos[name], scale, infos[scale])
        self._check_numbers(scales, formats)
        values = read(list(scales.values()))
        self.scales = {name: self._value(name, key, values[key]) for name, key in scales.items()}
        self._coded = {name for name, info in infos.items() if (name in self.scales or info.dtype in FLOAT8) and info.shape}
        self._unread = set(self.scales)
        self._read: list[Tensor] = []

    def defer(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Replace 8-bit weights by :class:`EightBit` and remove companions, in place, in all or some of its tensors."""
        for name in self.companions & tensors.keys():
            del tensors[name]
        for name in self._coded & tensors.keys():
            if not isinstance(tensors[name], StandIn):
                tensors[name] = EightBit.of([self._rows(name, tensors[name])], *self.infos[name].shape[1:])
        return tensors

    def defer_slices(self, slices: dict[str, Any]) -> dict[str, Any]:
        """:meth:`defer` for the slices of safetensors, or tensors, that transformers loads; returns a new dictionary."""
        kept = {name: value for name, value in slices.items() if name not in self.companions}
        noted = {name: value if isinstance(value, Tensor) else ReadSlice(value, self._read) for name, value in kept.items()}
        coded = {name: EightBitSlice(self._rows(name, noted[name])) for name in self._coded & kept.keys()}
        return noted | coded

    def release_read(self) -> None:
        """Let the pages go of what has been read through :meth:`defer_slices` since the last time."""
        while self._read:
            release_pages(self._read.pop())

    def _rows(self, name: str, numbers: Any) -> Rows:
        self._unread.discard(name)
        shape = self.infos[name].shape
        return Rows(name, numbers, shape, self.scales.get(name), 0, shape[0])

    def check_floating(self, model: nn.Module) -> None:
        """Make sure that the tensors for the model's floating-point parameters are floating-point.

        Raises:
            CheckpointError: names a tensor of integers, booleans or complex numbers.
        """
        for name, tensor in model.state_dict().items():
            info = self.infos.get(name)
            if info and tensor.is_floating_point() and not info.dtype.is_floating_point and name not in self.scales:
                dtype = dtype_name(info.dtype)
                raise CheckpointError(f"{name} is {dtype} in {self.where}, {tensor.dtype} in the model; {START}")

    def check_read(self) -> None:
        """Make sure that no weight was read without its scale.

        Raises:
            CheckpointError: names such a weight.
        """
        if self._unread:
            raise CheckpointError(
                f"{self._some(self._unread)} of {self.where} have scales that could not be applied, because the loader gave them "
                f"other names; {START}"
            )

    def _check_foreign(self) -> None:
        for kind, patterns, way_out in FOREIGN:
            found = [[name for name in self.infos if re.search(f"(?:{pattern})$", name)] for pattern in patterns]
            if all(found):
                self._refuse(found[0], f"{kind} layout", way_out)

    def _refuse(self, names: Iterable[str], kind: str, way_out: str = START) -> None:
        raise CheckpointError(f"{self.where} is quantized already: {self._some(names)} are in {kind}; {way_out}")

    def _some(self, names: Iterable[str]) -> str:
        listed = sorted(names)
        return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

    def _scale_of(self, name: str) -> str | None:
        """The name of this tensor's scale."""
        module, _, leaf = name.rpartition(".")
        beside = [f"{module}.{scale}" if module else scale for scale in BESIDE] if leaf == "weight" else []
        found = [key for key in (*(name + suffix for suffix in SUFFIXES), *beside) if key in self.infos]
        if len(found) > 1:
            raise CheckpointError(f"{name} of {self.where} has several scales, {' and '.join(found)}; {START}")
        few_bits = self.infos[name].dtype.itemsize == 1
        return found[0] if found and (few_bits or found[0].rpartition(".")[2] in LEAVES) else None

    def _check_alone(self, scales: Mapping[str, str]) -> None:
        """Refuse scales whose weights are missing."""
        known = set(scales.values())
        alone = [name for name in self.infos if name.rpartition(".")[2] in LEAVES and name not in known]
        if alone:
            raise CheckpointError(f"{self.where} holds {self._some(alone)}, but no weight that they scale; {START}")

    def _is_companion(self, name: str, scales: Mapping[str, str]) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf in (MARKER, COMFY):
            return True
        scale = scales.get(f"{module}.weight" if module else "weight", "")
        return bool(scale) and (leaf in OF_INPUTS or (leaf == "weight_format" and scale.endswith("SCB")))

    def _comfy_formats(self, read: Read, metadata: Mapping[str, str]) -> dict[str, str]:
        formats = comfy_formats(self.infos, read, metadata, self.where)
        for module, kind in formats.items():
            if kind not in COMFY_FORMATS:
                self._refuse([f"{module}.weight"], f"ComfyUI's format {kind}", OF_COMFY)
        return formats

    def _check_numbers(self, scales: Mapping[str, str], formats: Mapping[str, str]) -> None:
        """Refuse weights whose numbers have an unknown meaning."""
        beside: dict[str, list[str]] = {}
        for name in self.infos:
            beside.setdefault(name.rpartition(".")[0], []).append(name)
        for name in self.infos.keys() - self.companions:
            module, _, leaf = name.rpartition(".")
            dtype, scaled = self.infos[name].dtype, name in scales
            if module in formats and leaf == "weight" and not scaled:
                raise CheckpointError(f"{name} of {self.where} is in ComfyUI's format {formats[module]}, but has no scale; {START}")
            if dtype in FLOAT8 or scaled:
                near = [key for key in beside[module] if key.startswith(f"{name}_")] + beside.get(name, [])
                near += [key for key in beside[module] if leaf == "weight" and key.rpartition(".")[2] in MEANINGFUL]
                if dtype.itemsize == 1 and (strange := set(near) - self.companions):
                    self._refuse([name, *strange], "a layout that is not known here")
            is_number = dtype.is_floating_point and (dtype.itemsize > 1 or dtype in FLOAT8)
            if not is_number and (scaled or leaf in ("weight", "bias")) and not (scaled and dtype == torch.int8):
                self._refuse([name], f"{dtype_name(dtype)} numbers of which no scheme is known")

    def _value(self, name: str, key: str, scale: Tensor) -> Tensor:
        if self.infos[name].dtype.itemsize > 1 and not (scale == 1).all():
            dtype = self.infos[name].dtype
            raise CheckpointError(f"{name} of {self.where} is {dtype}, so what its {key} means is not known; {START}")
        scale = scale.float()
        return scale / BITSANDBYTES_UNIT if key.endswith("SCB") else scale


def comfy_formats(infos: Mapping[str, TensorInfo], read: Read, metadata: Mapping[str, str], where: str) -> dict[str, str]:
    """ComfyUI's descriptions of modules, in tensors or in a file's metadata: name of the format, and unusual settings.

    Raises:
        CheckpointError: a description is malformed.
    """
    out = {}
    for module, settings in comfy_settings(infos, read, metadata, where).items():
        unusual = [f"{key}={value!r}" for key, value in settings.items() if key not in COMFY_HARMLESS and value]
        out[module] = " with ".join([str(settings["format"]), *unusual])
    return out


def comfy_settings(
    infos: Mapping[str, TensorInfo], read: Read, metadata: Mapping[str, str], where: str
) -> dict[str, dict[str, Any]]:
    """ComfyUI's descriptions of modules, in tensors or in a file's metadata; each has a "format".

    Raises:
        CheckpointError: a description is malformed.
    """
    try:
        described: dict[str, Any] = dict(json.loads(metadata.get(COMFY_METADATA, "{}")).get("layers", {}))
        for key, value in read([name for name in infos if name.rpartition(".")[2] == COMFY]).items():
            described[key.removesuffix(f".{COMFY}")] = json.loads(bytes(value.flatten().to(torch.uint8).tolist()))
        return {module: dict(settings) | {"format": settings["format"]} for module, settings in described.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{where} has a malformed description of ComfyUI's formats: {error!r}") from error


def _check_scale(name: str, weight: TensorInfo, key: str, scale: TensorInfo) -> None:
    """Make sure that a scale is one number for the tensor, for each row, or for each block of 128 x 128.

    Raises:
        CheckpointError: the scale has another shape, or is no floating-point number.
    """
    rows, shape = (weight.shape or (1,))[0], scale.shape
    per_row = shape[:1] == (rows,) and all(size == 1 for size in shape[1:])
    per_block = len(weight.shape) == 2 and shape == tuple(-(-size // BLOCK) for size in weight.shape)
    one = all(size == 1 for size in shape)
    known = per_row if key.endswith("SCB") else one or per_row or (per_block and weight.dtype in FLOAT8)
    if not known or not scale.dtype.is_floating_point:
        dtype = dtype_name(scale.dtype)
        raise CheckpointError(
            f"{key} is {dtype} {list(shape)}, which is no scale of the tensor, of each row or of each block of {BLOCK} x {BLOCK} "
            f"of {name} {list(weight.shape)}; {START}"
        )


def read_source_files(paths: Iterable[str | Path]) -> SourceWeights:
    """The tensors of a checkpoint's files, from headers: only scales are read.

    Args:
        paths: safetensors files, or pickles, all of one checkpoint.

    Raises:
        CheckpointError: a file is damaged; or see :class:`SourceWeights`.
    """
    files = [Path(path) for path in paths]
    places: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found = _infos(path)
        infos |= found
        places |= dict.fromkeys(found, path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata |= file.metadata() or {}

    def read(names: list[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for path in dict.fromkeys(places[name] for name in names):
            wanted = [name for name in names if places[name] == path]
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    out |= {name: file.get_tensor(name) for name in wanted}
            else:
                tensors = _unpickled(path, "cpu")
                out |= {name: tensors[name] for name in wanted}
        return out

    return SourceWeights(infos, read, metadata, str(files[0] if len(files) == 1 else files[0].parent))


def _infos(path: Path) -> dict[str, TensorInfo]:
    if path.suffix == ".safetensors":
        return read_header(path)
    return tensor_infos(_unpickled(path, "meta"))


def _unpickled(path: Path, device: str) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # its class depends on what is wrong with the pickle
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def tensor_infos(tensors: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the values that are tensors."""
    return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items() if isinstance(value, Tensor)}


def read_source_tensors(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> SourceWeights:
    """The tensors of a state dict; see :class:`SourceWeights`.

    Raises:
        CheckpointError: the tensors come from a GGUF file; or see :class:`SourceWeights`.
    """
    if any(type(value).__name__ == "GGUFParameter" for value in tensors.values()):
        raise CheckpointError(f"a GGUF file is quantized already; read it with `qdiff convert gguf`, or {START}")
    return SourceWeights(tensor_infos(tensors), lambda names: {name: tensors[name] for name in names}, metadata, "the file")


def defer_source_tensors(tensors: dict[str, Any]) -> SourceWeights:
    """Read a state dict and :meth:`~SourceWeights.defer` its 8-bit weights, in place. A second call changes nothing.

    Args:
        tensors: a state dict, whose attribute ``metadata``, if it has one, holds the metadata of its file.

    Raises:
        CheckpointError: see :func:`read_source_tensors`.
    """
    source = read_source_tensors(tensors, getattr(tensors, "metadata", None))
    source.defer(tensors)
    if hasattr(tensors, "metadata"):
        tensors.metadata = {}  # it describes scales that are no longer there
    return source
