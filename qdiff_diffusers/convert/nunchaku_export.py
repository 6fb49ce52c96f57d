"""``qdiff convert to-nunchaku``: INT4 and NVFP4 SVDQuant layers as a ``nunchaku_lite`` folder, for GPUs that Nunchaku runs on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.files import check_tensors, read_json, weight_files
from ..checkpoint.folders import CONFIG, check_output, written_at_once
from ..checkpoint.quantization import Quantization
from ..config import is_ours
from ..errors import CheckpointError, ConfigError
from ..formats import IntegerFormat, LayerSpec, MinifloatFormat, TensorInfo, dtype_name
from ..formats.layer_table import StoredLayer
from .logical import INT4_GROUP, NVFP4_GROUP, LogicalLayer
from .nunchaku_folder import LITE, PRECISIONS, WEIGHTS, Advance, counted
from .packing_order import (
    AWQ_CODES,
    AWQ_GROUP,
    CODES,
    LORA_DOWN,
    LORA_UP,
    MICRO_SCALES,
    RANK_TILE,
    SCALES,
    TILE,
    pack_codes,
    pack_vector,
    pad_to,
    rounded_up,
)
from .stream import Source, stored_bytes, write_file

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LEAVES = ("codes", "scales", "zeros", "tensor_scale", "low_rank_down", "low_rank_up", "smooth", "bias")


class Export(NamedTuple):
    """Decisions made before any weight is written."""

    kinds: dict[str, str]  # kind of every packed layer: "int4", "nvfp4" or "awq"
    rank: int
    dtype: torch.dtype


def pack_w4a4(layer: LogicalLayer, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an "int4" or "nvfp4" layer in Nunchaku's order, by ``nunchaku_lite``'s names.

    Args:
        rank: rank that the low-rank branch is padded to, a multiple of 16.
        dtype: dtype of scales, factors and vectors.

    Raises:
        ValueError: a number cannot be written in ``dtype`` exactly.
    """
    rows, columns = (rounded_up(size, TILE) for size in layer.codes.shape)
    codes = layer.codes ^ 8 if layer.kind == "int4" else layer.codes
    out = {"qweight": pack_codes(CODES, pad_to(codes, (rows, columns))).view(rows, columns // 2)}
    if layer.kind == "int4":
        scales = pad_to(exactly(layer.scales, dtype, "scales"), (rows, columns // INT4_GROUP), 1)
        out["wscales"] = SCALES.pack(scales).view(columns // INT4_GROUP, rows)
    else:
        scales = pad_to(layer.scales, (rows, columns // NVFP4_GROUP), 1).view(torch.int8)
        out["wscales"] = MICRO_SCALES.pack(scales).view(columns // NVFP4_GROUP, rows).view(layer.scales.dtype)
    if layer.bias is not None:
        out["bias"] = pack_vector(pad_to(layer.bias.to(dtype), (rows,)))
    smooth = torch.ones(layer.codes.shape[1]) if layer.smooth is None else layer.smooth
    out["smooth_factor"] = pack_vector(pad_to(exactly(smooth, dtype, "smooth"), (columns,), 1))
    down = torch.zeros(0, layer.codes.shape[1]) if layer.down is None else layer.down
    up = torch.zeros(layer.codes.shape[0], 0) if layer.up is None else layer.up
    out["proj_down"] = LORA_DOWN.pack(pad_to(exactly(down, dtype, "low_rank_down"), (rank, columns))).view(columns, rank)
    out["proj_up"] = LORA_UP.pack(pad_to(exactly(up, dtype, "low_rank_up"), (rows, rank))).view(rows, rank)
    if layer.kind == "nvfp4":
        row_scales = torch.ones(layer.codes.shape[0]) if layer.row_scales is None else layer.row_scales
        channel, tensor = split_row_scales(row_scales.flatten().expand(layer.codes.shape[0]), dtype)
        out |= {"wcscales": pack_vector(pad_to(channel, (rows,), 1)), "wtscale": tensor}
    return out


def pack_awq(layer: LogicalLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an "awq" layer in Nunchaku's order."""
    assert layer.zeros is not None
    rows, columns = layer.codes.shape
    out = {
        "qweight": pack_codes(AWQ_CODES, layer.codes).view(torch.int32).view(rows // 4, columns // 2),
        "wscales": exactly(layer.scales, dtype, "scales").T.contiguous(),
        "wzeros": exactly(layer.zeros, dtype, "zeros").T.contiguous(),
    }
    return out if layer.bias is None else out | {"bias": layer.bias.to(dtype)}


def split_row_scales(row_scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``wcscales [rows]`` and ``wtscale [1]``, a power of two, whose product is ``row_scales`` exactly.

    Raises:
        ValueError: no such factors exist in ``dtype``.
    """
    largest = row_scales.abs().max()
    exponents = [0] if largest == 0 else [0, int(torch.frexp(largest).exponent) - 1]
    for exponent in exponents:
        unit = 2.0**exponent
        channel, tensor = (row_scales / unit).to(dtype), torch.tensor([unit], dtype=dtype)
        if torch.equal(channel.float() * tensor.float(), row_scales.float()):
            return channel, tensor
    raise ValueError(f"its tensor_scale cannot be written in {dtype_name(dtype)} exactly")


def exactly(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        ValueError: the conversion would round it.
    """
    out = tensor.to(dtype)
    if not torch.equal(out.to(tensor.dtype), tensor):
        raise ValueError(f"its {what} ({dtype_name(tensor.dtype)}) would be rounded in {dtype_name(dtype)}")
    return out


def logical_layer(spec: LayerSpec, tensors: dict[str, Tensor], columns: int) -> LogicalLayer:
    """A stored layer, of a kind that :func:`kind_of` accepts, in logical form."""
    from qdiff_kernels import unpack_bits

    return LogicalLayer(
        kind_of(spec),
        unpack_bits(tensors["codes"], 4, columns).to(torch.int8),
        tensors["scales"],
        zeros=tensors.get("zeros"),
        row_scales=tensors.get("tensor_scale"),
        bias=tensors.get("bias"),
        smooth=tensors.get("smooth"),
        down=tensors.get("low_rank_down"),
        up=tensors.get("low_rank_up"),
    )


def kind_of(spec: LayerSpec) -> str:
    """The kind of Nunchaku layer that can hold a spec.

    Raises:
        ValueError: Nunchaku has no such kind.
    """
    fmt = spec.format
    if spec.rotation:
        raise ValueError("Nunchaku does not rotate inputs")
    if spec.shift:
        raise ValueError("nunchaku_lite has no layers with shifted inputs")
    if isinstance(fmt, IntegerFormat) and (fmt.bits, fmt.group_size) == (4, INT4_GROUP):
        if not fmt.symmetric and not spec.rank and not spec.smooth and spec.activations == "none":
            return "awq"
        if fmt.symmetric and spec.activations == "int4":
            return "int4"
    nvfp4 = isinstance(fmt, MinifloatFormat) and (fmt.encodings, fmt.group_size, fmt.scale_dtype) == (
        ("e2m1",),
        NVFP4_GROUP,
        "e4m3",
    )
    if nvfp4 and spec.activations == "nvfp4":
        return "nvfp4"
    raise ValueError(
        "Nunchaku has INT4 in groups of 64 with int4 activations, NVFP4 with nvfp4 activations and asymmetric INT4 in groups of 64 "
        f"with 16-bit activations, not {spec.describe()}"
    )


def export_nunchaku(
    source: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write a qdiff checkpoint as a ``nunchaku_lite`` folder: every code and scale stays as it is.

    Args:
        source: the folder of a quantized model.
        output_dir: folder to write, which appears only once it is complete.
        dtype: dtype of scales and factors, "bfloat16" or "float16"; by default the one that holds all of them exactly.
        overwrite: replace a model that is in ``output_dir``.
        advance: called with (tensors written, tensors in all, name) after each tensor.

    Raises:
        ConfigError: ``source`` is no quantized model, or ``output_dir`` holds something that must not be replaced.
        CheckpointError: a layer has a format, a size or numbers that Nunchaku cannot store.
    """
    source, output_dir = Path(source), Path(output_dir)
    check_output(output_dir, overwrite, source)
    raw, config = _read(source)
    opened = Source(weight_files(source))
    check_tensors(config.layers, opened.infos)
    plan = _plan(config.layers, opened, dtype)
    infos = _infos(config.layers, plan, opened)
    lite = _lite_config(config, plan)
    with written_at_once(output_dir, overwrite, source, nbytes=stored_bytes(infos)) as folder:
        kept = {key: value for key, value in raw.items() if key != "quantization_config"}
        (folder / CONFIG).write_text(json.dumps(kept | {"quantization_config": lite}, indent=2) + "\n")
        tensors = counted(_tensors(config.layers, plan, opened, infos), len(infos), advance)
        write_file(folder / WEIGHTS, infos, tensors, {"format": "pt"})
    return output_dir


def _read(source: Path) -> tuple[dict[str, Any], Quantization]:
    raw = read_json(source / CONFIG) if (source / CONFIG).is_file() else None
    stored = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(stored, dict) or not is_ours(stored):
        raise ConfigError(f"{source} is not the folder of a model that qdiff quantized")
    assert isinstance(raw, dict)
    return raw, Quantization.from_dict(stored)


def _plan(layers: dict[str, StoredLayer], opened: Source, dtype: str | None) -> Export:
    kinds, ranks = {}, [0]
    for name, layer in layers.items():
        try:
            kinds[name] = kind_of(layer.spec)
            _check_size(layer, kinds[name])
        except ValueError as error:
            raise CheckpointError(f"layer {name} cannot be a layer of Nunchaku's: {error}") from error
        ranks.append(layer.spec.rank)
    if len({kind for kind in kinds.values() if kind != "awq"}) > 1:
        raise CheckpointError("nunchaku_lite has one precision for all W4A4 layers of a model, this one has int4 and nvfp4 layers")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    candidates = list(DTYPES.values()) if dtype is None else [DTYPES[dtype]]
    return Export(kinds, max(RANK_TILE, rounded_up(max(ranks), RANK_TILE)), _choose_dtype(layers, kinds, opened, candidates))


def _check_size(layer: StoredLayer, kind: str) -> None:
    if len(layer.shape) != 2:
        raise ValueError(f"nunchaku_lite has linear layers only, this is a convolution of {list(layer.shape)}")
    multiples = (4, AWQ_GROUP) if kind == "awq" else (TILE, TILE)
    if any(size % multiple for size, multiple in zip(layer.shape, multiples, strict=True)):
        raise ValueError(f"its sizes {list(layer.shape)} are no multiples of {multiples[0]} x {multiples[1]}")


def _choose_dtype(
    layers: dict[str, StoredLayer], kinds: dict[str, str], opened: Source, candidates: list[torch.dtype]
) -> torch.dtype:
    """The first dtype that holds every scale, factor and vector of all layers exactly."""
    problem = ""
    for dtype in candidates:
        try:
            for name, layer in layers.items():
                problem = f"layer {name}"
                _check_exact(
                    layer,
                    {leaf: opened.get(f"{name}.{leaf}") for leaf in layer.spec.tensors(layer.shape) if leaf != "codes"},
                    dtype,
                )
            return dtype
        except ValueError as error:
            problem = f"{problem}: {error}"
    raise CheckpointError(f"{problem}; no other dtype that Nunchaku has holds all layers either")


def _check_exact(layer: StoredLayer, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for leaf, tensor in tensors.items():
        if leaf == "tensor_scale":
            split_row_scales(tensor.flatten().expand(layer.shape[0]), dtype)
        elif tensor.dtype.itemsize > 1:
            exactly(tensor, dtype, leaf)


def _infos(layers: dict[str, StoredLayer], plan: Export, opened: Source) -> dict[str, TensorInfo]:
    packed = {f"{name}.{leaf}" for name in layers for leaf in LEAVES}
    out: dict[str, TensorInfo] = {}
    for name, layer in layers.items():
        shapes = _shapes(layer, plan.kinds[name], plan.rank, plan.dtype, f"{name}.bias" in opened.infos)
        out |= {f"{name}.{leaf}": info for leaf, info in shapes.items()}
    return out | {key: info for key, info in opened.infos.items() if key not in packed}


def _shapes(layer: StoredLayer, kind: str, rank: int, dtype: torch.dtype, bias: bool) -> dict[str, TensorInfo]:
    rows, columns = layer.shape
    if kind == "awq":
        scales = TensorInfo((columns // AWQ_GROUP, rows), dtype)
        out = {"qweight": TensorInfo((rows // 4, columns // 2), torch.int32), "wscales": scales, "wzeros": scales}
        return out | ({"bias": TensorInfo((rows,), dtype)} if bias else {})
    scale_dtype = dtype if kind == "int4" else torch.float8_e4m3fn
    out = {
        "qweight": TensorInfo((rows, columns // 2), torch.int8),
        "wscales": TensorInfo((columns // PRECISIONS[kind], rows), scale_dtype),
    }
    out |= {"bias": TensorInfo((rows,), dtype)} if bias else {}
    out |= {
        "smooth_factor": TensorInfo((columns,), dtype),
        "proj_down": TensorInfo((columns, rank), dtype),
        "proj_up": TensorInfo((rows, rank), dtype),
    }
    return out | ({"wcscales": TensorInfo((rows,), dtype), "wtscale": TensorInfo((1,), dtype)} if kind == "nvfp4" else {})


def _tensors(
    layers: dict[str, StoredLayer], plan: Export, opened: Source, infos: dict[str, TensorInfo]
) -> Iterator[tuple[str, Tensor]]:
    written = set()
    for name, layer in layers.items():
        stored = {leaf: opened.get(f"{name}.{leaf}") for leaf in LEAVES if f"{name}.{leaf}" in opened.infos}
        logical = logical_layer(layer.spec, stored, layer.shape[1])
        packed = pack_awq(logical, plan.dtype) if plan.kinds[name] == "awq" else pack_w4a4(logical, plan.rank, plan.dtype)
        for leaf, tensor in packed.items():
            written.add(f"{name}.{leaf}")
            yield f"{name}.{leaf}", tensor
    for key in infos:
        if key not in written:
            yield key, opened.get(key)


def _lite_config(config: Quantization, plan: Export) -> dict[str, Any]:
    w4a4 = [name for name, kind in plan.kinds.items() if kind != "awq"]
    awq = [name for name, kind in plan.kinds.items() if kind == "awq"]
    out: dict[str, Any] = {"quant_method": LITE, "compute_dtype": dtype_name(plan.dtype)}
    if w4a4:
        precision = plan.kinds[w4a4[0]]
        out["svdq_w4a4"] = {"precision": precision, "group_size": PRECISIONS[precision], "rank": plan.rank, "targets": w4a4}
    if awq:
        out["awq_w4a16"] = {"precision": "int4", "group_size": AWQ_GROUP, "targets": awq}
    return out
