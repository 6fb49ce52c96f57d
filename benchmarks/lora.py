"""LoRA on packed layers: how far the output is from that of the dense layer with the same adapter, and what the adapter costs.

python benchmarks/lora.py [--seconds 20] [--blocks 4]

Errors: one linear layer of 768 x 768 and one 3 x 3 convolution of 64 channels per method, a random rank-32 adapter of a tenth of
the layer's gain, against the dense layer that the packed one stands for, with the very same adapter. Cost: some blocks of DiT-XL/2
(1152 channels) in bfloat16, batch 2 of 256 tokens, adapters on all attention and feed-forward layers; the minimum over interleaved
repeats of each of: no adapter, active, fused.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from common import write
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.layers import dense_layer
from qdiff_diffusers.model.packing import quantize_layer
from qdiff_diffusers.model.selection import select_layers

RANK = 32
METHODS: dict[str, Callable[[], QDiffConfig]] = {
    "rtn 4": lambda: RTNConfig(bits=4),
    "rtn 4, int8 activations": lambda: RTNConfig(bits=4, activations="int8"),
    "fp 4": lambda: FPConfig(bits=4),
    "nvfp4": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant int4": lambda: SVDQuantConfig(weight_format="int4", rank=16),
    "svdquant int4, int8 activations": lambda: SVDQuantConfig(weight_format="int4", rank=16, activations="int8"),
    "svdquant int4, int4 activations": lambda: SVDQuantConfig(weight_format="int4", rank=16, activations="int4"),
    "vq 2": lambda: VQConfig(bits=2),
    "aq 2": lambda: AQConfig(bits=2, effort=0),
}
TIMED = ("rtn 4", "rtn 4, int8 activations", "svdquant int4, int8 activations")
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(768, 768), lambda: torch.randn(256, 768)),
    "conv": (lambda: nn.Conv2d(64, 64, 3, padding=1), lambda: torch.randn(1, 64, 16, 16)),
}


def adapted(model: nn.Module, targets: list[str], size: float) -> Any:
    """The model with a random adapter of rank 32 on ``targets``, the same for models of the same shape."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    out = get_peft_model(model, config, autocast_adapter_dtype=False)  # in the model's dtype, as diffusers loads adapters
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if "lora_" in name:
                fan = parameter[0].numel()
                parameter.normal_().mul_(fan**-0.5 * (size if "lora_B" in name else 1))
    return out


def errors(method: str) -> dict[str, float]:
    """Relative distances from the dense layer's output, by layer and dtype, and of fused from active ones."""
    out = {}
    for kind, (make, inputs) in LAYERS.items():
        torch.manual_seed(0)
        layer = make()
        quantize_layer(layer, "layer", layer.weight.detach().clone(), METHODS[method](), torch.float32)
        dense = dense_layer(copy.deepcopy(layer))
        x = inputs()
        with torch.no_grad():
            wanted, bare = adapted(nn.Sequential(dense), ["0"], 0.1)(x), layer(x)
            plain = dense_layer(copy.deepcopy(layer))(x)
            model = adapted(nn.Sequential(layer), ["0"], 0.1)
            active = model(x)
            model.merge_adapter()
            out[f"{kind} fp32"] = distance(active, wanted)
            out[f"{kind} without"] = distance(bare, plain)
            out[f"{kind} fused"] = distance(model(x), active)
    return out


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cost(method: str, seconds: float, blocks: int) -> dict[str, float]:
    """Milliseconds of a step without adapters, with active and with fused ones."""
    torch.manual_seed(0)
    base = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, num_layers=blocks, sample_size=32, num_embeds_ada_norm=10
    )
    base = base.eval().requires_grad_(False)
    config = METHODS[method]()
    targets, _ = select_layers(base, config, [])
    for name in targets:
        module = base.get_submodule(name)
        quantize_layer(module, name, module.weight.detach().clone(), config, torch.bfloat16)
    base = base.bfloat16()
    names = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    active, fused = (adapted(copy.deepcopy(base), names, 0.1) for _ in range(2))
    fused.merge_adapter()
    inputs = {
        "hidden_states": torch.randn(2, 4, 32, 32).bfloat16(),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    runs = {"none": base, "active": active, "fused": fused}
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    with torch.no_grad():
        while rounds < 4 or time.perf_counter() < end:  # the first round warms up
            for name, model in runs.items():
                start = time.perf_counter()
                model(**inputs)
                if rounds:
                    best[name] = min(best[name], time.perf_counter() - start)
            rounds += 1
    return {name: 1000 * value for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of timing per method; 0 for errors only")
    parser.add_argument("--blocks", type=int, default=4, help="of DiT-XL/2, to time")
    parser.add_argument("--shared", action="store_true", help="say that the machine had other work to do")
    options = parser.parse_args()
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method} | errors(method)
        if method in TIMED and options.seconds:
            times = cost(method, options.seconds, options.blocks)
            row |= {f"ms {name}": value for name, value in times.items()}
            row |= {name: 100 * (times[name] / times["none"] - 1) for name in ("active", "fused")}
        rows.append(row)
        print(row, flush=True)
    columns = [
        ("method", "method", ""),
        ("linear fp32", "linear", ".1e"),
        ("linear without", "without adapter", ".1e"),
        ("linear fused", "fused - active", ".1e"),
        ("conv fp32", "conv", ".1e"),
        ("conv without", "without adapter", ".1e"),
        ("conv fused", "fused - active", ".1e"),
        ("ms none", "ms per step", ".0f"),
        ("active", "active costs %", "+.1f"),
        ("fused", "fused costs %", "+.1f"),
    ]
    write(
        "lora",
        rows,
        columns,
        rank=RANK,
        blocks=options.blocks,
        machine="shared with other work: times are rough" if options.shared else "otherwise idle",
    )


if __name__ == "__main__":
    main()
