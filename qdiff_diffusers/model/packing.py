"""Steps that the loaders of diffusers and transformers share: pack a layer, prepare a model for packed tensors, make it dense."""

from __future__ import annotations

import sys
import zlib

import torch
from torch import Tensor, nn

from ..checkpoint.pages import release_pages
from ..config import COMPUTE_DTYPES, QDiffConfig
from ..errors import CheckpointError, ConfigError, QDiffError
from ..formats import dtype_name
from ..formats.layer_table import StoredLayer
from ..layers import PackedLayer, dense_layer, follow_timesteps, pack_layer, unsupported_reason
from ..layers.offloading import CASTING, check_forward, diffusers_hook, fetch, without_group_offloading
from ..methods import quantize_weight
from ..methods.threads import block_threads

ALIGNMENT = 64  # bytes, alignment of the memory that torch allocates on the CPU


def quantize_layer(module: nn.Module, name: str, weight: Tensor, config: QDiffConfig, compute_dtype: torch.dtype) -> StoredLayer:
    """Quantize ``weight`` and convert ``module`` in place. The seed follows from the name, so the order of layers is free.

    Raises:
        QDiffError: names the layer whose weight cannot be quantized.
    """
    stored, tensors = quantize_named(name, weight, config)
    check_magnitude(name, pack_layer(module, stored.spec, compute_dtype, tensors))
    return stored


def quantize_named(name: str, weight: Tensor, config: QDiffConfig) -> tuple[StoredLayer, dict[str, Tensor]]:
    """Quantize the weight of the layer with this name: its table entry and its tensors.

    Raises:
        QDiffError: names the layer whose weight cannot be quantized.
    """
    try:
        with block_threads():
            spec, tensors, error = quantize_weight(weight, config, seed=config.seed + zlib.crc32(name.encode()))
    except ValueError as failure:
        raise QDiffError(f"layer {name} {list(weight.shape)}: {failure}") from failure
    return StoredLayer(spec, tuple(weight.shape), float(f"{error:.4g}")), tensors


def check_compute_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that layers which are not packed cannot compute in.

    Raises:
        ConfigError: names it.
    """
    if dtype_name(dtype) not in COMPUTE_DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype}: what is not quantized is computed in it. Weights that "
            "are stored in float8 need no such dtype, they are read as they are"
        )


def pack_finished(model: nn.Module, layers: dict[str, tuple[StoredLayer, dict[str, Tensor]]], compute_dtype: torch.dtype) -> None:
    """Convert the named layers in place to packed ones with these specs and tensors. The bias absorbs a shift of the inputs."""
    for name, (stored, tensors) in layers.items():
        layer = pack_layer(model.get_submodule(name), stored.spec, compute_dtype, tensors)
        check_magnitude(name, layer)
        if stored.spec.shift and layer.bias is not None:
            offset = stored.spec.shift_offset(layer.packed_tensors(), layer.weight_shape)
            layer.bias.data = (layer.bias.float() - offset).to(layer.bias.dtype)
    follow_timesteps(model)


def check_magnitude(name: str, layer: PackedLayer) -> None:
    """Refuse weights beyond a layer's compute dtype; in a dense layer they would be infinite.

    Raises:
        QDiffError: names the layer.
    """
    tensors, limit = layer.packed_tensors(), torch.finfo(layer.compute_dtype).max
    if layer.compute_dtype != torch.float16 or any(t.is_meta for t in tensors.values()) or layer.spec.bound(tensors) <= limit:
        return
    largest = float(layer.dequantize(torch.float32).abs().amax())
    if not largest <= limit:
        raise QDiffError(f"layer {name} has weights of up to {largest:.3g}, float16 ends at {limit:.0f}; load it as torch.bfloat16")


def prepare_packed_layers(model: nn.Module, layers: dict[str, StoredLayer], compute_dtype: torch.dtype) -> None:
    """Convert the named layers in place, their tensors still on the meta device.

    Raises:
        CheckpointError: the model has no such layer, or one of another kind or shape.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"the checkpoint packs layer {name}, which {type(model).__name__} does not have")
        if reason := unsupported_reason(module):
            raise CheckpointError(f"the checkpoint packs layer {name}, but in the model it is a {reason}")
        if tuple(module.weight.shape) != layer.shape:
            expected = list(module.weight.shape)
            raise CheckpointError(f"layer {name} is {list(layer.shape)} in the checkpoint, {expected} in the model")
        infos = layer.spec.tensors(layer.shape)
        empty = {leaf: torch.empty(info.shape, dtype=info.dtype, device="meta") for leaf, info in infos.items()}
        pack_layer(module, layer.spec, compute_dtype, empty)
    follow_timesteps(model)


def check_loaded(model: nn.Module) -> None:
    """Make sure that every packed layer was loaded, with scales that its compute dtype can hold.

    Raises:
        CheckpointError: names the first layer that was not filled, or whose activation scales are no positive numbers.
        QDiffError: names the first layer that computes in float16 and has weights beyond it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedLayer):
            continue
        for leaf, tensor in module.packed_tensors().items():
            if tensor.is_meta and not hasattr(module, "_hf_hook"):  # accelerate keeps offloaded tensors in its hook
                raise CheckpointError(f"tensor {name}.{leaf} was never loaded; the checkpoint is incomplete")
        for leaf in ("input_scales", "input_steps")[: module.spec.input_scales]:
            _check_scales(f"{name}.{leaf}", getattr(module, leaf), positive=leaf == "input_scales")
        check_magnitude(name, module)


def _check_scales(name: str, values: Tensor, positive: bool) -> None:
    if values.is_meta:
        return
    if not bool((values.isfinite() & (values > 0 if positive else True)).all()):
        raise CheckpointError(
            f"tensor {name} must hold {'positive numbers' if positive else 'timesteps'}, got {values.tolist()[:4]}"
        )


def release_checkpoint(model: nn.Module) -> None:
    """Copy all tensors but the codes out of a memory-mapped checkpoint file.

    A single tensor left there keeps a whole dense checkpoint resident. Besides, its alignment follows from the length of the
    file's header, and matrix products of float32 tensors that are aligned differently differ in the last bit.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or name.rpartition(".")[2] == "codes":
            continue
        if tensor.data_ptr() % ALIGNMENT or tensor.untyped_storage().nbytes() != tensor.nbytes:
            mapped, tensor.data = tensor.data, tensor.data.clone()
            release_pages(mapped)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def is_or_was_packed(model: nn.Module) -> bool:
    """Whether a model has packed layers, or had some until :func:`dequantize_model`."""
    return getattr(model, "dequantized_by_qdiff", False) or bool(packed_layers(model))


def without_adapters(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model itself, under the names they had before PEFT wrapped some layers."""
    if not any(".base_layer." in name for name in state_dict):
        return state_dict
    kept = {name: tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in kept.items()}


def dequantize_model(model: nn.Module) -> None:
    """Turn every packed layer back into a dense one, in place. Adapters, hooks and offloading go on with the dense layers.

    Raises:
        QDiffError: a hook or adapter of a layer could not be kept; nothing was changed.
    """
    layers, adapters = packed_layers(model), _checked_adapters(model)
    for name, module in (*layers.items(), *adapters.items()):
        check_forward(name, module)
    with without_group_offloading(model):
        for name, layer in layers.items():
            _check_reachable(name, layer)
        for layer in layers.values():
            dense_layer(layer)
            _store_in_casting_dtype(layer)
        if adapters:
            _follow_dense_bases(adapters)
    follow_timesteps(model)
    model.dequantized_by_qdiff = True  # type: ignore[assignment]


def _checked_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's adapters on packed layers, checked to work on dense ones too; none if PEFT has not been imported."""
    if "peft.tuners.lora" not in sys.modules:
        return {}
    from ..layers.adapters import check_dense_base, packed_adapters

    adapters = packed_adapters(model)
    for name, adapter in adapters.items():
        check_dense_base(name, adapter)
    return adapters


def _follow_dense_bases(adapters: dict[str, nn.Module]) -> None:
    from ..layers.adapters import follow_dense_base

    for adapter in adapters.values():
        follow_dense_base(adapter)


def _check_reachable(name: str, layer: PackedLayer) -> None:
    if layer.codes.is_meta and fetch(layer)["codes"].is_meta:
        raise QDiffError(
            f"layer {name} is on the meta device, offloaded by a hook of a module around it; take the hooks off first "
            "(pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_module(model, recurse=True)), offload again afterwards"
        )


def _store_in_casting_dtype(layer: nn.Module) -> None:
    """Cast a dense layer to the dtype in which diffusers' layerwise casting stores it between forward passes."""
    if (hook := diffusers_hook(layer, CASTING)) is not None:
        layer.to(hook.storage_dtype)
