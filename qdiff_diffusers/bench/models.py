"""Whole models with random weights at their real shapes: one forward pass, as in one step of sampling."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import QDiffConfig
from ..errors import ConfigError
from ..measuring.contenders import OURS, Contender, compiled, describe_failure, detached, first_tensor, resident_bytes
from ..model.selection import select_layers
from . import ours
from .layers import Advance, contenders_for, describe_race
from .results import Results
from .timing import Call, Timer, make_timer, race

WEIGHT_SCALE = 0.02
BLOCK = 1 << 20  # number of random values, which are repeated to fill a model
FLUX_TEXT, FLUX_IMAGE, FLUX_SIDE = 512, 4096, 64
SLICE_IMAGE, SLICE_SIDE = 1024, 32


class Model(NamedTuple):
    """A model to build on the meta device, and the inputs of one step."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    what: str


def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(num_layers=28, num_attention_heads=16, attention_head_dim=72, num_embeds_ada_norm=1000)


def _dit_inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 32, 32).to(device, dtype),
        "timestep": torch.tensor([500, 500], device=device),
        "class_labels": torch.tensor([1, 1000], device=device),
    }


def _flux(double: int, single: int) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)


def _flux_inputs(device: torch.device, dtype: torch.dtype, image: int, side: int) -> dict[str, Any]:
    ids = torch.zeros(image, 3)
    ids[:, 1], ids[:, 2] = torch.arange(image) // side, torch.arange(image) % side
    return {
        "hidden_states": torch.randn(1, image, 64).to(device, dtype),
        "encoder_hidden_states": torch.randn(1, FLUX_TEXT, 4096).to(device, dtype),
        "pooled_projections": torch.randn(1, 768).to(device, dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([4.0], device=device, dtype=dtype),  # 4000 is exact in bf16
        "img_ids": ids.to(device, dtype),
        "txt_ids": torch.zeros(FLUX_TEXT, 3, device=device, dtype=dtype),
    }


def _sdxl(deepest: int = 10) -> Any:
    """``deepest``: transformer blocks of the innermost level; fewer make a slice."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, deepest],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def _sdxl_inputs(device: torch.device, dtype: torch.dtype, height: int = 64, width: int = 64) -> dict[str, Any]:
    ids = torch.tensor([[512, 512, 0, 0, 512, 512]], device=device, dtype=dtype)
    return {
        "sample": torch.randn(1, 4, height, width).to(device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 77, 2048).to(device, dtype),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280).to(device, dtype), "time_ids": ids},
    }


MODELS: dict[str, Model] = {
    "dit-xl-2": Model(_dit, _dit_inputs, "DiT-XL/2, 28 blocks, batch 2, 256 tokens each"),
    "flux-slice": Model(
        lambda: _flux(2, 2),
        lambda device, dtype: _flux_inputs(device, dtype, SLICE_IMAGE, SLICE_SIDE),
        "FLUX-dev's width, 2 double and 2 single blocks, 1024 image and 512 text tokens",
    ),
    "flux": Model(
        lambda: _flux(19, 38),
        lambda device, dtype: _flux_inputs(device, dtype, FLUX_IMAGE, FLUX_SIDE),
        "FLUX-dev's shape, 12 B parameters, 4096 image and 512 text tokens (1024 pixels)",
    ),
    "sdxl-unet": Model(_sdxl, _sdxl_inputs, "SDXL's UNet, latents of 64 x 64, batch 1"),
}
# Slices with 512 and 4096 tokens: of the image beside 512 of text, and at a UNet's first level with attention.
for _tokens, _height, _width in ((512, 16, 32), (4096, 64, 64)):
    MODELS[f"flux-slice-{_tokens}"] = Model(
        lambda: _flux(2, 2),
        partial(_flux_inputs, image=_tokens, side=_width),
        f"FLUX-dev's width, 2 double and 2 single blocks, {_tokens} image and {FLUX_TEXT} text tokens",
    )
    MODELS[f"sdxl-slice-{_tokens}"] = Model(
        lambda: _sdxl(deepest=2),
        partial(_sdxl_inputs, height=2 * _height, width=2 * _width),
        f"SDXL's UNet with 2 blocks in its innermost level, {_tokens} tokens in its first with attention",
    )


def find_model(name: str) -> Model:
    """The model with this name.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name]


def model_contenders(
    device: torch.device, packer: ours.Packer, only: Sequence[str] | None, compiled_too: bool = False
) -> list[Contender]:
    """Everyone, or those that ``only`` selects; each of ours followed by its twin under ``torch.compile`` if that is wanted."""
    out = []
    for contender in contenders_for(device, packer, only):
        out.append(contender)
        if compiled_too and contender.family == OURS:
            out.append(replace(contender, name=f"{contender.name}-compile", compiled=True))
    return out


@torch.no_grad()
def run_models(
    results: Results,
    names: Iterable[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    only: Sequence[str] | None = None,
    compiled_too: bool = False,
    advance: Advance = lambda what: None,
) -> None:
    """Make the measurements that ``results`` does not hold yet. Only the dense model and one contender are in memory at a time.

    Args:
        budget: seconds of timing for each contender.
        compiled_too: each of ours under ``torch.compile``, too.
        advance: called for each model and contender, with its name.
    """
    for name in names:
        model = find_model(name)
        contenders = model_contenders(device, ours.Packer(whole_model=True), only, compiled_too)
        wanted = [c for c in contenders if results.missing(_key(name, c))]
        for contender in contenders:
            if contender not in wanted:
                advance(contender.name)
        if wanted:
            _run_model(results, name, model, wanted, device, dtype, budget, advance)


def _run_model(
    results: Results,
    name: str,
    model: Model,
    contenders: Sequence[Contender],
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    advance: Advance,
) -> None:
    torch.manual_seed(0)
    dense = fill(model.make, device, dtype)
    inputs = model.inputs(device, dtype)
    timer = make_timer(device, cold=False)
    targets, _ = select_layers(
        dense, QDiffConfig(**ours.PRESETS["int8"]), list(getattr(dense, "_keep_in_fp32_modules", None) or [])
    )
    size = resident_bytes(dense)
    dense(**inputs)
    for contender in contenders:
        cell: dict[str, Any] = {"model": name, "what": model.what, "contender": contender.name, "family": contender.family}
        cell |= {"bits": contender.bits, "dense_bytes": size, "note": contender.note}
        cell |= _measure(contender, dense, inputs, list(targets), timer, budget, device)
        results.add(_key(name, contender), **cell)
        results.write()
        advance(contender.name)
        gc.collect()


def _measure(
    contender: Contender,
    dense: nn.Module,
    inputs: dict[str, Any],
    targets: Sequence[str],
    timer: Timer,
    budget: float,
    device: torch.device,
) -> dict[str, Any]:
    """Build one contender, run it once, and race it against the dense model."""
    if reason := contender.unavailable(device):
        return {"reason": reason}
    try:
        start = time.perf_counter()
        model, converted, formats = convert_model(contender, dense, targets)
        cell: dict[str, Any] = {"build_seconds": time.perf_counter() - start, "bytes": resident_bytes(model)}
        cell |= {"layers": len(converted), "format": ", ".join(formats)}
        start = time.perf_counter()
        output = first_tensor(model(**inputs))
        cell["first_seconds"] = time.perf_counter() - start
    except Exception as error:
        return {"reason": describe_failure(error)}
    if not torch.isfinite(output).all():
        return {"reason": "broken: its output is not finite"}

    def step(module: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return module(**inputs)

        return call

    return cell | describe_race(race({contender.name: Call(step(model))}, Call(step(dense)), timer, budget)[contender.name])


def convert_model(contender: Contender, dense: nn.Module, targets: Sequence[str]) -> tuple[nn.Module, list[str], list[str]]:
    """A copy of ``dense`` with the contender's layers, the names of these layers, and their stored formats if they are qdiff's.

    All contenders convert the same layers, those inside the repeated blocks, as far as they support them. Everything else is
    shared with ``dense``.
    """
    if contender.family == "torch":
        return (compiled(dense) if contender.compiled else dense), [], []
    memo = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    model = copy.deepcopy(dense, memo)
    converted: list[str] = []
    formats: dict[str, None] = {}
    for name in targets:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        if not isinstance(layer, contender.layers):
            continue
        packed = contender.convert(detached(layer)).eval()
        setattr(parent, leaf, packed)
        converted.append(name)
        if contender.family == OURS:
            formats[ours.describe(packed)] = None
    return (compiled(model) if contender.compiled else model), converted, list(formats)


def fill(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a model without initialising it, and fill it with small random weights.

    Vectors (biases, norms) keep to 0 and 1, so that the output stays finite through any number of blocks.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = make()
    nn.Module.to(model, dtype)  # a diffusers model's own to() warns of layers that its checkpoints keep in float32
    block = (torch.randn(BLOCK) * WEIGHT_SCALE).to(device, dtype)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                values = _values(name, parameter, block)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    return model.to(device).eval()


def _values(name: str, parameter: Tensor, block: Tensor) -> Tensor:
    if parameter.ndim < 2:
        return torch.full(parameter.shape, float(name.endswith("weight")), dtype=block.dtype, device=block.device)
    repeats = math.ceil(parameter.numel() / block.numel())
    return block.repeat(repeats)[: parameter.numel()].reshape(parameter.shape).clone()


def _key(name: str, contender: Contender) -> tuple[str, ...]:
    return ("model", name, contender.name)
