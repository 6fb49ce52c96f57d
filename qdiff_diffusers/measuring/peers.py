"""Other packages' quantizers as contenders, through their public interfaces, at their defaults unless the name says otherwise.

A peer is imported only when a row is built; one that is missing, or that cannot do what its row needs, raises then and becomes a
line in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .contenders import Contender

GPU = ("cuda",)
KITCHEN_BLOCKS = (256, 64, 16)  # columns that ConvRot rotates together: its own size first, else the next that divides the row
LINEAR_AND_CONV = (nn.Linear, nn.Conv2d)


class UnchangedError(ValueError):
    """A peer leaves a layer of this shape in 16 bits."""


def contenders(device: torch.device) -> list[Contender]:
    """Rows of every peer, whether it is installed or not."""
    return [*_torchao(device), *_bitsandbytes(), *_quanto(), *_gguf(), *_sdnq(), *_orbitquant(), *_comfy_kitchen(), *_gpu_only()]


def distributions() -> list[str]:
    """Names of the peers on the package index."""
    return sorted({c.install for c in contenders(torch.device("cpu"))} | {"numba", "triton"})


def _within(layer: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    """Apply a function that replaces the children of a model to a single layer."""
    model = nn.Sequential(layer)
    changed = change(model)
    out = (changed if isinstance(changed, nn.Module) else model)[0]  # type: ignore[index]
    _require_change(out)
    return out


def _require_change(layer: nn.Module) -> None:
    """Raise if a peer left the layer unchanged, which would be timed in its place."""
    weight = getattr(layer, "weight", None)
    if type(layer) in LINEAR_AND_CONV and type(weight) is nn.Parameter and weight.is_floating_point():
        raise UnchangedError("left the layer as it was")


def _torchao(device: torch.device) -> list[Contender]:
    def convert(layer: nn.Module, make: Callable[[], Any]) -> nn.Module:
        from torchao.quantization import quantize_

        return _within(layer, lambda model: quantize_(model, make()))

    def api(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        def make() -> Any:
            import torchao.quantization as quantization

            return getattr(quantization, name)(*args, **kwargs)

        return make

    def int4_cpu() -> Any:
        from torchao.prototype.quantization.int4 import inference_workflow

        return inference_workflow.PrototypeInt4WeightOnlyConfig(set_inductor_config=False)

    def int4_a8_cpu() -> Any:
        from torchao.prototype.quantization.int4 import inference_workflow

        return inference_workflow.Int8DynamicActivationInt4WeightConfig(set_inductor_config=False)

    def int4_gpu() -> Any:
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        return Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, set_inductor_config=False)

    def fp8_row() -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)

    def row(name: str, make: Callable[[], Any], bits: int, **more: Any) -> Contender:
        modules = ("torchao",)
        return Contender(f"torchao-{name}", "torchao", partial(convert, make=make), bits, "torchao", modules, **more)

    int8 = api("Int8WeightOnlyConfig", set_inductor_config=False)
    int8_a8 = api("Int8DynamicActivationInt8WeightConfig", set_inductor_config=False)
    return [
        row("int8", int8, 8),
        row("int8-compile", int8, 8, compiled=True, devices=GPU),
        row("int8-a8", int8_a8, 8),
        row("int8-a8-compile", int8_a8, 8, compiled=True),
        row("int4", int4_cpu if device.type == "cpu" else int4_gpu, 4),
        row("int4-a8-compile", int4_a8_cpu, 4, compiled=True, devices=("cpu",)),
        row("fp8-a8", fp8_row, 8, devices=GPU),
        row("fp8-a8-compile", fp8_row, 8, devices=GPU, compiled=True),
    ]


def _bitsandbytes() -> list[Contender]:
    def nf4(layer: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        assert isinstance(layer, nn.Linear)
        weight = layer.weight.data
        out = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
        )
        out.weight = bnb.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", module=out)
        out.bias = layer.bias
        return out.to(weight.device)

    def int8(layer: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        assert isinstance(layer, nn.Linear)
        weight = layer.weight.data
        out = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        out.weight = bnb.nn.Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False)
        out.bias = layer.bias
        return out.to(weight.device)

    modules = ("bitsandbytes",)
    return [
        Contender("bitsandbytes-nf4", "bitsandbytes", nf4, 4, "bitsandbytes", modules),
        Contender("bitsandbytes-int8-a8", "bitsandbytes", int8, 8, "bitsandbytes", modules),
    ]


def _quanto() -> list[Contender]:
    def convert(layer: nn.Module, qtype: str) -> nn.Module:
        from optimum import quanto

        def change(model: nn.Module) -> None:
            quanto.quantize(model, weights=getattr(quanto, qtype))
            quanto.freeze(model)

        return _within(layer, change)

    def row(bits: int) -> Contender:
        change, modules = partial(convert, qtype=f"qint{bits}"), ("optimum.quanto",)
        return Contender(f"quanto-int{bits}", "quanto", change, bits, "optimum-quanto", modules, layers=LINEAR_AND_CONV)

    return [row(bits) for bits in (8, 4, 2)]


def _gguf() -> list[Contender]:
    def convert(layer: nn.Module, kind: str) -> nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        assert isinstance(layer, nn.Linear)
        weight, quant_type = layer.weight.data, gguf.GGMLQuantizationType[kind]
        if kind.endswith("_K"):
            data = _random_blocks((layer.out_features, layer.in_features), gguf.GGML_QUANT_SIZES[quant_type], kind)
        else:
            data = torch.from_numpy(gguf.quantize(weight.float().cpu().numpy(), quant_type))
        out = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=weight.dtype, device="meta")
        out.weight = GGUFParameter(data.to(weight.device), quant_type=quant_type)
        out.bias = layer.bias
        if kind.endswith("_K"):
            dense = partial(_gguf_dense, data=data, quant_type=quant_type)
            out.stands_for = dense  # type: ignore[assignment]
        return out

    def row(kind: str, bits: int) -> Contender:
        note = "random codes, its error is against their own weight" if kind.endswith("_K") else ""
        return Contender(f"gguf-{kind}", "gguf", partial(convert, kind=kind), bits, "gguf", ("gguf",), note=note)

    return [row("Q8_0", 8), row("Q4_0", 4), row("Q4_K", 4), row("Q2_K", 2)]


def _random_blocks(shape: tuple[int, int], block: tuple[int, int], kind: str) -> Tensor:
    """Bytes of a K-quant with random codes: the gguf package decodes those types but does not quantize to them.

    Only the two float16 factors of a block must make sense; they come first in Q4_K and last in Q2_K.
    """
    weights, size = block
    rows, columns = shape
    if columns % weights:
        raise ValueError(f"{kind} has blocks of {weights} weights, the layer has {columns} columns")
    blocks = torch.randint(0, 256, (rows, columns // weights, size), dtype=torch.uint8)
    factors = torch.full((rows, columns // weights, 2), 1e-3, dtype=torch.float16).view(torch.uint8)
    where = slice(0, 4) if kind == "Q4_K" else slice(size - 4, size)
    blocks[..., where] = factors
    return blocks.flatten(1)


def _gguf_dense(weight: Tensor, data: Tensor, quant_type: Any) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.dequantize(data.numpy(), quant_type)).to(weight)


def _sdnq() -> list[Contender]:
    def convert(layer: nn.Module, **options: Any) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        settings = {"use_quantized_matmul": False, "add_skip_keys": False, "quant_conv": True} | options
        return _within(layer, lambda model: sdnq_post_load_quant(model, torch_dtype=layer.weight.dtype, **settings))

    def row(name: str, bits: int, **options: Any) -> Contender:
        return Contender(f"sdnq-{name}", "sdnq", partial(convert, **options), bits, "sdnq", ("sdnq",), layers=LINEAR_AND_CONV)

    return [
        row("int8", 8, weights_dtype="int8"),
        row("int8-a8", 8, weights_dtype="int8", use_quantized_matmul=True),
        row("int4", 4, weights_dtype="int4"),
        row("uint4", 4, weights_dtype="uint4"),
        row("uint4-a8", 4, weights_dtype="uint4", use_quantized_matmul=True),
        row("fp4", 4, weights_dtype="float4_e2m1fn"),
        row("uint4-svd", 4, weights_dtype="uint4", use_svd=True, svd_rank=32),
        row("uint3", 3, weights_dtype="uint3"),
        row("uint3-svd", 3, weights_dtype="uint3", use_svd=True, svd_rank=32),
        row("uint2", 2, weights_dtype="uint2"),
        row("uint2-svd", 2, weights_dtype="uint2", use_svd=True, svd_rank=32),
    ]


def _orbitquant() -> list[Contender]:
    def convert(layer: nn.Module, name: str) -> nn.Module:
        from orbitquant import quantize_model, recipe

        weight_bits, activation_bits = int(name[1]), int(name[3])
        config = recipe(
            "w4a4",  # they differ in their bits only
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            lowbit_boundary_protection=0,
            lowbit_interior_protection=False,
        )
        device = str(layer.weight.device)
        return _within(layer, lambda model: quantize_model(model, config, quantization_device=device) and None)

    return [
        Contender(f"orbitquant-{name}", "orbitquant", partial(convert, name=name), int(name[1]), "orbitquant", ("orbitquant",))
        for name in ("w4a4", "w4a6", "w4a8", "w2a4")
    ]


class _KitchenLinear(nn.Module):
    """A linear layer in one of comfy-kitchen's layouts, multiplied as ComfyUI's own layers do.

    Args:
        inputs: whether inputs are quantized into the same layout first; integer layouts quantize theirs themselves.
        decode: whether what is quantized is decoded and then multiplied, where the layout has no product on this device.
    """

    def __init__(self, layer: nn.Linear, layout: str, inputs: bool, decode: bool, **options: Any) -> None:
        from comfy_kitchen.tensor import QuantizedTensor

        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.layout, self.inputs, self.decode, self.bias = layout, inputs, decode, layer.bias
        quantized = QuantizedTensor.from_float(layer.weight.data, layout, **options)
        self.settings = {field.name: getattr(quantized._params, field.name) for field in fields(quantized._params)}
        self.register_buffer("codes", quantized._qdata)
        for name, value in self.settings.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

        held = {name: getattr(self, name) if isinstance(value, Tensor) else value for name, value in self.settings.items()}
        weight: Any = QuantizedTensor(self.codes, self.layout, get_layout_class(self.layout).Params(**held))
        flat: Any = x.reshape(-1, x.shape[-1])
        if self.inputs:
            flat = QuantizedTensor.from_float(flat, self.layout)
        if self.decode:
            weight, flat = weight.dequantize(), flat.dequantize() if self.inputs else flat
        return nn.functional.linear(flat, weight.to(x.dtype), self.bias).view(*x.shape[:-1], -1)


def _comfy_kitchen() -> list[Contender]:
    """The layouts of ComfyUI's own quantized files, with their own rounding."""

    def row(name: str, bits: int, layout: str, inputs: bool = False, decode: bool = False, **options: Any) -> Contender:
        def convert(layer: nn.Module) -> nn.Module:
            assert isinstance(layer, nn.Linear)
            columns = layer.in_features
            if "convrot_groupsize" not in options:
                return _KitchenLinear(layer, layout, inputs, decode, **options)
            block = next((size for size in KITCHEN_BLOCKS if columns % size == 0), None)
            if block is None:
                raise UnchangedError(f"{name} needs a multiple of {KITCHEN_BLOCKS[-1]} columns, not {columns}")
            return _KitchenLinear(layer, layout, inputs, decode, **options | {"convrot_groupsize": block})

        return Contender(f"comfy-kitchen-{name}", "comfy-kitchen", convert, bits, "comfy-kitchen", ("comfy_kitchen",))

    return [
        row("fp8-a8", 8, "TensorCoreFP8Layout", inputs=True),
        row("int8-a8", 8, "TensorWiseINT8Layout", per_channel=True),
        row("int8-convrot-a8", 8, "TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=256),
        row("mxfp8-a8", 8, "TensorCoreMXFP8Layout", inputs=True, decode=True),
        row("nvfp4", 4, "TensorCoreNVFP4Layout", decode=True),
        row("nvfp4-a4", 4, "TensorCoreNVFP4Layout", inputs=True),
        row("convrot-w4a4", 4, "TensorCoreConvRotW4A4Layout", convrot_groupsize=256),
    ]


def _gpu_only() -> list[Contender]:
    def gemlite(layer: nn.Module, helper: str) -> nn.Module:
        import gemlite.helper

        return getattr(gemlite.helper, helper)(device=str(layer.weight.device)).from_linear(layer)

    def gemlite_groups(layer: nn.Module, bits: int, group: int = 64) -> nn.Module:
        """A gemlite layer in a narrow format, which takes another quantizer's codes: rounded, ``w = (code - zero) * scale``."""
        from gemlite.helper import A16Wn

        assert isinstance(layer, nn.Linear)
        weight = layer.weight.data
        groups = weight.float().unflatten(1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
        codes = ((groups - low) / scales).round_().to(torch.uint8).flatten(1)
        zeros, bias = (-low / scales).squeeze(-1), None if layer.bias is None else layer.bias.data
        packer = A16Wn(device=str(weight.device), dtype=weight.dtype)
        return packer.from_weights(codes, scales.squeeze(-1), zeros, bits, group, bias)

    def nunchaku(layer: nn.Module) -> nn.Module:
        from diffusers.quantizers.nunchaku.utils import SVDQW4A4Linear

        assert isinstance(layer, nn.Linear)
        capability = torch.cuda.get_device_capability(layer.weight.device)
        if capability[0] == 9:
            raise ValueError("has no kernels for Hopper GPUs")
        sizes = layer.in_features, layer.out_features
        out = SVDQW4A4Linear(
            *sizes, rank=32, bias=layer.bias is not None, torch_dtype=layer.weight.dtype, device=layer.weight.device
        )
        for parameter in out.parameters():
            parameter.data.zero_()
        out.stands_for = torch.zeros_like  # type: ignore[assignment]
        return out

    more: dict[str, Any] = {"devices": GPU}
    gem = ("gemlite", ("gemlite",))
    return [
        Contender("gemlite-int8", "gemlite", partial(gemlite, helper="A16W8"), 8, *gem, **more),
        Contender("gemlite-int4", "gemlite", partial(gemlite_groups, bits=4), 4, *gem, **more),
        Contender("gemlite-int2", "gemlite", partial(gemlite_groups, bits=2), 2, *gem, **more),
        Contender("gemlite-int8-a8", "gemlite", partial(gemlite, helper="A8W8_int8_dynamic"), 8, *gem, **more),
        Contender("gemlite-fp8-a8", "gemlite", partial(gemlite, helper="A8W8_fp8_dynamic"), 8, *gem, **more),
        Contender("nunchaku-w4a4", "nunchaku_lite", nunchaku, 4, "kernels", ("kernels",), note="zero weights: time only", **more),
    ]
