"""Nunchaku checkpoints made up for tests, and the dense layers that they stand for, written out from the stated semantics.

A checkpoint is made by the rules of the format, layer by layer, from random codes and scales. The reference keeps every layer of
the source (fused as it is there) as plain float matrices, and quantizes its inputs group by group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdiff_diffusers.convert.logical import GELU_SHIFT, LogicalLayer
from qdiff_diffusers.convert.nunchaku_export import pack_awq, pack_w4a4

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
EVEN_FIRST = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])
ENGINE_NAMES = {"smooth_factor": "smooth", "proj_down": "lora_down", "proj_up": "lora_up"}


def random_layer(kind: str, rows: int, columns: int, rank: int = 16, bias: bool = True, unsigned: bool = False) -> LogicalLayer:
    """A layer of about unit gain."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int8)
    size = columns**-0.5
    maybe_bias = 0.2 * torch.randn(rows).bfloat16() if bias else None
    if kind == "awq":
        scales = (0.2 * size * (1 + torch.rand(rows, -(-columns // 64)))).bfloat16()
        return LogicalLayer("awq", codes, scales, zeros=(-7 * scales.float()).bfloat16(), bias=maybe_bias)
    extras = {
        "bias": maybe_bias,
        "smooth": (0.5 + torch.rand(columns)).bfloat16(),
        "shift": torch.full((columns,), GELU_SHIFT).bfloat16() if unsigned and kind == "int4" else None,
        "down": (size * torch.randn(rank, columns)).bfloat16(),
        "up": (0.3 * torch.randn(rows, rank)).bfloat16(),
    }
    if kind == "int4":
        return LogicalLayer(kind, codes, (0.2 * size * (1 + torch.rand(rows, -(-columns // 64)))).bfloat16(), **extras)
    scales = (100 * (1 + torch.rand(rows, -(-columns // 16)))).to(torch.float8_e4m3fn)
    row_scales = (size * (1 + torch.rand(rows)) / 500).bfloat16().float()
    return LogicalLayer(kind, codes, scales, row_scales=row_scales, **extras)


def dense(layer: LogicalLayer) -> Tensor:
    """The weights that codes and scales stand for, as smoothed inputs see them, float64."""
    group = 16 if layer.kind == "nvfp4" else 64
    scales = layer.scales.double().repeat_interleave(group, 1)[:, : layer.codes.shape[1]]
    if layer.kind == "awq":
        return layer.codes.double() * scales + layer.zeros.double().repeat_interleave(group, 1)[:, : layer.codes.shape[1]]
    if layer.kind == "int4":
        return (layer.codes.double() - 8) * scales
    return E2M1.double()[layer.codes.long()] * scales * layer.row_scales.double()[:, None]


def quantized(x: Tensor, kind: str, unsigned: bool) -> Tensor:
    """Inputs as the matrix unit sees them, float64."""
    out = torch.empty_like(x)
    width = 16 if kind == "nvfp4" else 64
    for start in range(0, x.shape[-1], width):
        part = x[..., start : start + width]
        if kind == "nvfp4":
            scale = (part.abs().amax(-1, keepdim=True) / 6).float().to(torch.float8_e4m3fn).double()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            table = EVEN_FIRST.double()
            code = table[((part / scale).abs()[..., None] - table).abs().argmin(-1)] * part.sign()
        else:
            top, low = (part.amax(-1, keepdim=True) / 15, 0) if unsigned else (part.abs().amax(-1, keepdim=True) / 7, -7)
            scale = torch.where(top > 0, top, torch.ones_like(top))
            code = (part / scale).round().clamp(low, 15 if unsigned else 7)
        out[..., start : start + width] = code * scale
    return out


def apply_layer(layer: LogicalLayer, x: Tensor) -> Tensor:
    """What the engine's layer computes, in float64."""
    x = x.double()
    if layer.kind == "awq":
        y = x @ dense(layer).T
    else:
        shifted = x if layer.shift is None else x + layer.shift.double()
        y = quantized(shifted / layer.smooth.double(), layer.kind, layer.shift is not None) @ dense(layer).T
        y = y + (x @ layer.down.double().T) @ layer.up.double().T  # of the unsmoothed input
    return y if layer.bias is None else y + layer.bias.double()


class Reference(nn.Module):
    """Stands for one layer of the model: some rows of source layers, each of which sees its part of the inputs."""

    def __init__(self, layers: list[LogicalLayer], rows: slice, conv: bool = False) -> None:
        super().__init__()
        self.layers, self.rows, self.conv = layers, rows, conv
        self.weight = nn.Parameter(torch.empty(0))  # models ask for a dtype

    def forward(self, x: Tensor) -> Tensor:
        values = x.movedim(1, -1) if self.conv else x
        y, start = 0, 0
        for layer in self.layers:
            y = y + apply_layer(layer, values[..., start : start + layer.codes.shape[1]])[..., self.rows]
            start += layer.codes.shape[1]
        return (y.movedim(-1, 1) if self.conv else y).to(x.dtype)


@dataclass
class Checkpoint:
    """Tensors of a source, and the reference model with its layers replaced."""

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def w4a4(self, prefix: str, modules: list[str], layer: LogicalLayer, engine: bool = True, index: Tensor | None = None) -> None:
        """Store a layer whose rows, in the model's order, are those of ``modules``; ``index``: rows in the source's order."""
        stored = layer if index is None else layer.rows(index)
        for name, tensor in pack_w4a4(stored, 16 * -(-len(layer.down) // 16), torch.bfloat16).items():
            self.tensors[f"{prefix}.{ENGINE_NAMES.get(name, name) if engine else name}"] = tensor
        if engine:
            self.tensors[f"{prefix}.smooth_orig"] = self.tensors[f"{prefix}.smooth"].clone()
        self.replace(modules, layer)

    def awq(self, prefix: str, module: str, layer: LogicalLayer, splits: int = 1) -> None:
        """Store an adaLN layer the engine's way: rows interleaved, "1 + scale" in the bias."""
        rows = layer.codes.shape[0]
        stored = layer
        if splits > 1:
            bias = layer.bias.clone().view(splits, -1)
            for part in {1, splits - 2}:
                bias[part] += 1
            layer = LogicalLayer("awq", layer.codes, layer.scales, zeros=layer.zeros, bias=undone(bias, splits))
            order = torch.arange(rows).view(splits, -1).T.reshape(-1)
            stored = LogicalLayer("awq", layer.codes, layer.scales, zeros=layer.zeros, bias=bias.flatten()).rows(order)
        self.tensors |= {f"{prefix}.{name}": tensor for name, tensor in pack_awq(stored, torch.bfloat16).items()}
        self.replace([module], layer)

    def replace(self, modules: list[str], layer: LogicalLayer) -> None:
        start = 0
        for name in modules:
            parent, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            old = owner.get_submodule(leaf)
            size = old.weight.shape[0] if isinstance(old, nn.Linear | nn.Conv2d) else old.layers[0].codes.shape[0]
            if isinstance(old, Reference):
                old.layers.append(layer)
            else:
                owner._modules[leaf] = Reference([layer], slice(start, start + size), isinstance(old, nn.Conv2d))
            start += size

    def keep(self, rename: dict[str, str]) -> None:
        """Store what is left of the model as it is, in bfloat16; ``rename``: parts of names."""
        references = {name for name, module in self.model.named_modules() if isinstance(module, Reference)}
        for name, tensor in self.model.state_dict().items():
            if name.rpartition(".")[0] in references:
                continue
            for old, new in rename.items():
                name = name.replace(old, new)
            self.tensors.setdefault(name, tensor.bfloat16())

    def save(self, folder: Path, config: dict | None, quantization: dict | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        if config is not None:
            extra = {} if quantization is None else {"quantization_config": quantization}
            (folder / "config.json").write_text(json.dumps(config | extra))
        return folder


def undone(bias: Tensor, splits: int) -> Tensor:
    """The bias of the dense layer that a stored one ``[splits, rows]`` stands for, exactly."""
    exact = bias.double().clone()
    for part in {1, splits - 2}:
        exact[part] -= 1
    return exact.flatten()
