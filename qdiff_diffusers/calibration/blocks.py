"""Block-wise reconstruction: each repeated block is tuned to give the full-precision block's outputs for the same inputs."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor, nn

from ..model.packing import pack_finished, packed_layers
from . import parallel
from .layerwise import FinishedLayer
from .relay import block_names
from .settings import Calibration
from .store import Store, groups_within, read_tensors, write_tensors
from .trajectories import Call, call_model, inputs_by_name, to_device
from .tuning import tune


class TunedBlock:
    """A tuned block: the tensors of its layers, its other parameters, and a log."""

    def __init__(self, layers: dict[str, dict[str, Tensor]], others: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
        self.layers = layers
        self.others = others
        self.log = log


def tune_blocks(
    model: nn.Module, layers: dict[str, FinishedLayer], calls: Store, calibration: Calibration, folder: Path, dtype: torch.dtype
) -> dict[str, TunedBlock]:
    """Tune every block that holds quantized layers. Memory is bounded by one block, its copy and its inputs, or those of as many
    blocks as ``calibration.memory_limit`` holds, which are then recorded together.

    In a distributed run each process takes some of the blocks.

    Args:
        model: the full-precision model, which is not changed.
        layers: the layers as quantized one by one.
        calls: recorded calls of the model.
        folder: folder of the workspace in which finished blocks are kept.
        dtype: the layers' compute dtype.
    """
    inside = {name: [n for n in layers if n.startswith(f"{name}.")] for name in block_names(model)}
    blocks = [name for name, own in inside.items() if own]
    tuned: dict[str, TunedBlock] = {}
    tuning = calibration.tuning
    if tuning.minutes and blocks:
        share = tuning.minutes * parallel.world_size() / len(blocks)
        calibration = replace(calibration, tuning=replace(tuning, minutes=share))
    mine = []
    for index, name in enumerate(blocks):
        found = _read(folder / f"{name}.safetensors")
        if found is not None:
            tuned[name] = found
        elif parallel.is_mine(index):
            mine.append(name)
    progress = logging.tqdm(total=len(mine), desc="Tuning blocks", unit="block", delay=2)
    sizes = {name: size * len(calls) for name, size in _call_bytes(model, mine, calls[0], folder).items()} if mine else {}
    for group in groups_within(sizes, calibration.memory_limit):
        seen = _record_blocks(model, group, calls, folder, calibration.memory_limit)
        for name in group:
            own = {n.removeprefix(f"{name}."): layers[n] for n in inside[name]}
            tuned[name] = _tune_block(model, name, own, seen.pop(name), calibration, folder, dtype)
            _write(folder / f"{name}.safetensors", tuned[name])
            progress.update()
    progress.close()
    return {name: parallel.share(tuned.get(name), index) for index, name in enumerate(blocks)}


def apply(model: nn.Module, layers: dict[str, FinishedLayer], tuned: dict[str, TunedBlock]) -> dict[str, FinishedLayer]:
    """Put the tuned blocks' other parameters into the model; returns the layers with their tuned tensors."""
    layers = dict(layers)
    for block, result in tuned.items():
        for leaf, tensors in result.layers.items():
            name = f"{block}.{leaf}"
            layers[name] = layers[name]._replace(tensors=tensors)
        with torch.no_grad():
            for leaf, value in result.others.items():
                model.get_parameter(f"{block}.{leaf}").copy_(value)
    return layers


def _tune_block(
    model: nn.Module,
    name: str,
    layers: dict[str, FinishedLayer],
    seen: Store,
    calibration: Calibration,
    folder: Path,
    dtype: torch.dtype,
) -> TunedBlock:
    teacher = model.get_submodule(name)
    block = copy.deepcopy(teacher).requires_grad_(False)
    device = next(teacher.parameters()).device
    own = {leaf: (layer.stored, {k: t.to(device) for k, t in layer.tensors.items()}) for leaf, layer in layers.items()}
    pack_finished(block, own, dtype)
    dense = {leaf: layer.target(teacher.get_submodule(leaf).weight) for leaf, layer in layers.items()}  # type: ignore[arg-type]

    def loss_of(call: Call) -> Tensor:
        outputs = _tensors(block(**to_device(call["inputs"], device)))
        wanted = [t.to(device) for t in call["output"]]
        return sum(((y.float() - t.float()).square().mean() for y, t in zip(outputs, wanted, strict=True)), torch.zeros(()))

    inside = {key: p for key, p in block.named_parameters() if p.is_floating_point()} if calibration.tuning.dense else {}
    packed = packed_layers(block)
    log = tune(packed, inside, seen, loss_of, calibration.tuning, dense, folder / f"{name}.snapshot.safetensors", f"Tuning {name}")
    shutil.rmtree(seen.folder, ignore_errors=True)
    for leaf, layer in packed.items():
        bias, dense_bias = inside.get(f"{leaf}.bias"), layer.dense_bias()
        if layer.spec.shift and bias is not None and dense_bias is not None:
            bias.data = dense_bias  # packing the whole model adds the shift to the bias again
    return TunedBlock(
        {leaf: {k: getattr(layer, k).detach().cpu() for k in layer.tensor_infos()} for leaf, layer in packed.items()},
        {key: p.detach().cpu() for key, p in inside.items()},
        [{"block": name, **entry} for entry in log],
    )


def _call_bytes(model: nn.Module, names: list[str], call: Call, folder: Path) -> dict[str, int]:
    """Bytes recorded for each block at one call of the model."""
    stores = _record_blocks(model, names, [call], folder, sys.maxsize)
    return {name: store.nbytes for name, store in stores.items()}


@torch.no_grad()
def _record_blocks(
    model: nn.Module, names: Sequence[str], calls: Iterable[Call], folder: Path, memory_limit: int
) -> dict[str, Store]:
    """Inputs and outputs of some blocks over all calls of the model."""
    stores = {name: Store(folder / f"{name}.calls", memory_limit) for name in names}
    step = 0

    def recorder(store: Store) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = inputs_by_name(module, args, kwargs)
            store.append({"inputs": inputs, "output": [t.detach().cpu() for t in _tensors(output)], "step": step})

        return record

    with ExitStack() as stack:
        for name, store in stores.items():
            handle = model.get_submodule(name).register_forward_hook(recorder(store), with_kwargs=True)
            stack.callback(handle.remove)
        for call in calls:
            step = call["step"]
            call_model(model, call["inputs"])
    return stores


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a block's output, however it is nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [t for value in values for t in _tensors(value)]


def _write(path: Path, block: TunedBlock) -> None:
    tensors = {f"layer/{leaf}/{k}": t for leaf, ts in block.layers.items() for k, t in ts.items()}
    write_tensors(path, tensors | {f"other/{k}": t for k, t in block.others.items()}, {"log": block.log})


def _read(path: Path) -> TunedBlock | None:
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError, ValueError):
        return None
    block = TunedBlock({}, {}, metadata["log"])
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "other":
            block.others[rest] = tensor.clone()
        else:
            leaf, _, part = rest.rpartition("/")
            block.layers.setdefault(leaf, {})[part] = tensor.clone()
    return block
