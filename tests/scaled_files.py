"""Checkpoints whose weights are stored in 8 bits with scales, as other programs write them, and what those weights are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
BLOCK = 128


def by_tensor(weight: Tensor, largest: float) -> Tensor:
    return weight.abs().max() / largest


def by_row(weight: Tensor, largest: float) -> Tensor:
    return weight.flatten(1).abs().amax(1).clamp(min=1e-6) / largest  # the row of a token that pads is all zero


def by_block(weight: Tensor, largest: float) -> Tensor:
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / largest


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale in the shape of its weight, element by element from the definition."""
    if scale.ndim == 2 and scale.shape != (len(weight), 1):
        return torch.stack(
            [torch.stack([scale[i // BLOCK, j // BLOCK] for j in range(weight.shape[1])]) for i in range(len(weight))]
        )
    return scale.reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight)


def to_float8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """The numbers, and the weight that they are."""
    numbers = (weight / spread(scale, weight)).to(dtype)
    return numbers, numbers.float() * spread(scale, weight)


def description(text: dict[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


def comfy_scaled(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_tensor(weight, 448)
    numbers, value = to_float8(weight, scale)
    module = name.removesuffix(".weight")
    return {name: numbers, f"{module}.scale_weight": scale.reshape(1), f"{module}.scale_input": torch.tensor([3.0])}, value


def weight_scale(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_tensor(weight, 448)
    numbers, value = to_float8(weight, scale)
    return {name: numbers, f"{name}_scale": scale, name.removesuffix("weight") + "input_scale": torch.tensor(2.0)}, value


def row_scale(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_row(weight, 448)
    numbers, value = to_float8(weight, scale)
    return {name: numbers, f"{name}_scale": scale[:, None]}, value


def e5m2(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_tensor(weight, 1000)
    numbers, value = to_float8(weight, scale, torch.float8_e5m2)
    module = name.removesuffix(".weight")
    return {name: numbers, f"{name}_scale": scale, f"{module}.comfy_quant": description({"format": "float8_e5m2"})}, value


def block_scale(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_block(weight, 448) if weight.ndim == 2 else by_tensor(weight, 448)
    numbers, value = to_float8(weight, scale)
    return {name: numbers, f"{name}_scale_inv": scale}, value


def int8_rows(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = by_row(weight, 127)
    numbers = (weight / spread(scale, weight)).round().to(torch.int8)
    return {name: numbers, f"{name}_scale": scale}, numbers.float() * spread(scale, weight)


def comfy_int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    tensors, value = int8_rows(name, weight)
    text = {"format": "int8_tensorwise", "full_precision_matrix_mult": True, "convrot": False}
    return tensors | {name.removesuffix("weight") + "comfy_quant": description(text)}, value


def bitsandbytes(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    largest = by_row(weight, 1)
    numbers = (weight * 127 / spread(largest, weight)).round().to(torch.int8)
    module = name.removesuffix(".weight")
    tensors = {name: numbers, f"{module}.SCB": largest, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, numbers.float() * spread(largest / 127, weight)


def plain_float8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    numbers = weight.to(torch.float8_e4m3fn)
    return {name: numbers}, numbers.float()


SCHEMES: dict[str, Callable[[str, Tensor], tuple[Tensors, Tensor]]] = {
    f.__name__: f
    for f in (comfy_scaled, weight_scale, row_scale, e5m2, block_scale, int8_rows, comfy_int8, bitsandbytes, plain_float8)
}


def store(tensors: Tensors, scheme: str, names: Iterable[str] | None = None) -> tuple[Tensors, Tensors]:
    """The file in which ``names``, all matrices if not given, are stored by ``scheme``; and the tensors that it stands for."""
    chosen = {name for name, t in tensors.items() if name.endswith("weight") and t.ndim >= 2} if names is None else set(names)
    file, values = dict(tensors), dict(tensors)
    for name in chosen:
        stored, values[name] = SCHEMES[scheme](name, tensors[name].float())
        file |= stored
    if scheme == "comfy_scaled":
        file["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return {name: t.contiguous() for name, t in file.items()}, values
