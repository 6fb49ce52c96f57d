"""Other packages' quantizers as rows, each with its own defaults, on the same layers that qdiff's methods quantize."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import QDiffConfig
from ..errors import ConfigError
from ..layers import PackedLayer
from ..measuring import k_quants
from ..measuring.contenders import Contender, detached, resident_bytes
from ..measuring.peers import UnchangedError
from ..measuring.peers import contenders as bench_contenders
from ..model.selection import select_layers
from .metrics import relative_error

K_QUANTS = {"Q4_K": 4, "Q3_K": 3, "Q2_K": 2}
DENSE_BITS = 16
LINEARITY_SAMPLES = 512  # tokens, enough for peers that quantize the inputs of large batches only
LINEARITY_ERROR = 1e-4  # moves a PSNR of 62 dB by less than 0.01
ANY_METHOD: dict[str, Any] = {"method": "rtn"}  # all methods choose the same layers


def _k_quant(layer: nn.Module, kind: str) -> nn.Module:
    """A GGUF layer whose codes are chosen by ``measuring.k_quants``."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    assert isinstance(layer, nn.Linear)
    weight = layer.weight.data
    if weight.shape[1] % k_quants.SUPER_BLOCK:
        raise UnchangedError(f"{kind} needs a multiple of {k_quants.SUPER_BLOCK} columns")
    data = k_quants.quantize(weight, kind).to(weight.device)
    out = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=weight.dtype, device="meta")
    out.weight = GGUFParameter(data, quant_type=gguf.GGMLQuantizationType[kind])
    out.bias = layer.bias
    return out


def _all_peers() -> dict[str, Contender]:
    """The peers of the speed benchmarks whose weights have a quality of their own, and K-quants with searched codes."""
    found = [c for c in bench_contenders(torch.device("cpu")) if not c.compiled and c.family not in ("gemlite", "nunchaku_lite")]
    real = [
        Contender(f"gguf-{kind}", "gguf", partial(_k_quant, kind=kind), bits, "gguf", ("gguf",)) for kind, bits in K_QUANTS.items()
    ]
    return {c.name: c for c in (*found, *real)}


PEERS = _all_peers()


def find_peer(name: str, device: torch.device) -> Contender:
    """A peer that can run here.

    Raises:
        ConfigError: the peer is not installed, or does not run on this device.
    """
    peer = next(c for c in bench_contenders(device) if c.name == name) if name.startswith("torchao") else PEERS[name]
    if reason := peer.unavailable(device):
        raise ConfigError(f"{name}: {reason}")
    return peer


def target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that every row quantizes: all inside the repeated blocks that can be packed."""
    names, _ = select_layers(model, QDiffConfig(**ANY_METHOD), list(getattr(model, "_keep_in_fp32_modules", None) or []))
    return {name: model.get_submodule(name) for name in names}


def weight_shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' weights, in the order of the layers."""
    return {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # type: ignore[operator, arg-type]


@torch.no_grad()
def apply_peer(peer: Contender, model: nn.Module, names: Sequence[str]) -> list[str]:
    """Convert layers of ``model`` in place, except those that the peer does not support.

    Returns:
        Names of the layers that it converted.

    Raises:
        Exception: any error of the peer; UnchangedError if it converts no layer at all.
    """
    converted = []
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, peer.layers):
            continue
        try:
            out = peer.convert(detached(layer)).eval()
        except UnchangedError:
            continue
        model.set_submodule(name, out)
        converted.append(name)
    if not converted:
        raise UnchangedError(f"{peer.name} takes none of the {len(names)} layers")
    return converted


@torch.no_grad()
def make_dense(model: nn.Module, names: Sequence[str]) -> int:
    """Replace converted layers that are linear by plain ones, so that drawing needs no decoding. Returns their number.

    A layer's outputs for the unit vectors are its weight. A layer that is not linear, because it quantizes its input too, stays
    as it is. Peers' layers take up to 50 times as long as plain ones on a CPU.
    """
    replaced = 0
    for name in names:
        layer: Any = model.get_submodule(name)
        columns = getattr(layer, "in_features", None)
        if columns is None:
            continue
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        bias = layer(torch.zeros(1, columns).to(parameter))
        weight = layer(torch.eye(columns).to(parameter)) - bias
        twin = nn.Linear(columns, weight.shape[1], device=weight.device, dtype=weight.dtype).requires_grad_(False)
        twin.weight.data, twin.bias.data = weight.T.contiguous(), bias[0].clone()
        x = torch.randn(LINEARITY_SAMPLES, columns, generator=torch.Generator().manual_seed(0)).to(parameter)
        if relative_error(twin(x), layer(x)) < LINEARITY_ERROR:
            model.set_submodule(name, twin)
            replaced += 1
    return replaced


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating-point tensors have another dtype."""
    out = copy.deepcopy(model)
    nn.Module.to(out, dtype)  # a diffusers model's own to() warns of layers that its checkpoints keep in float32
    return out


def stored_bits(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> float:
    """Stored bits per weight over the layers of ``shapes``; one that is dense counts 16 bits per weight.

    qdiff's layers count as in their checkpoints, a peer's with every tensor that the layer holds except the bias.
    """
    bits = weights = 0.0
    for name, shape in shapes.items():
        layer, count = model.get_submodule(name), float(torch.Size(shape).numel())
        weights += count
        if isinstance(layer, PackedLayer):
            bits += layer.bits_per_weight * count
        elif type(layer) in (nn.Linear, nn.Conv2d) and _is_plain(layer):
            bits += DENSE_BITS * count
        else:
            bits += 8 * (resident_bytes(layer) - _bias_bytes(layer))
    return bits / weights


def families() -> list[str]:
    """Families of the peers."""
    return list(dict.fromkeys(peer.family for peer in PEERS.values()))


def _is_plain(layer: nn.Module) -> bool:
    weight: Any = getattr(layer, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _bias_bytes(layer: nn.Module) -> int:
    bias: Any = getattr(layer, "bias", None)
    return 0 if bias is None else bias.untyped_storage().nbytes()
