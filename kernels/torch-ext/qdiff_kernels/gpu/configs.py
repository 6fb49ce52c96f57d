"""Tile sizes: from a tuned table of the device where there is one, else from a rule. Nothing is searched while a model runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
Config = TypeVar("Config")
FOLDER = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class LinearConfig:
    """How one product is launched."""

    block_tokens: int
    block_rows: int
    block_columns: int
    splits: int = 1  # programs that share one tile's columns
    warps: int = 4
    stages: int = 3
    two_pass: bool = False  # decode the weight to memory first, then multiply


def choose(weight: str, inputs: str, tokens: int, rows: int, columns: int, device: torch.device) -> LinearConfig:
    """The configuration of a product.

    Args:
        weight: kind and bits of the packed weight, "codebook2", "integer4", ...
        inputs: dtype of the multiplied inputs, "bfloat16" or, quantized, "int8", "fp8", "int4"; "conv ..." for convolutions

    Returns:
        The tuned entry of the smallest tuned token count that is at least ``tokens`` and the nearest shape, or a rule's.
    """
    name = device_name(device)
    entries = tuned(name).get(f"{weight} {inputs}")
    return _nearest(entries, tokens, rows, columns) if entries else rule(weight, inputs, tokens, rows, columns, processors(name))


def rule(weight: str, inputs: str, tokens: int, rows: int, columns: int, multiprocessors: int) -> LinearConfig:
    """Without a tuned table: fill the device, keep tiles as large as registers and shared memory of an 8.0 GPU allow.

    What the assembler reports for 9.0 chose the sizes (kernels/tests/compile_kernels.py): larger tiles spill registers, more
    stages of a codebook's look-ups overflow shared memory.
    """
    codebook = weight.startswith("codebook")
    if "float32" in inputs and tokens > 16:  # no matrix unit takes float32 as it is: leave the product to the vendor's library
        return LinearConfig(32, 64, 64, stages=2, two_pass=True)
    if tokens <= 128:
        block_tokens = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        tiles = -(-rows // 64) * -(-tokens // block_tokens)
        splits = max(1, min(16, 2 * multiprocessors // tiles, columns // 256))
        return LinearConfig(block_tokens, 64, 64, splits, warps=4, stages=2 if codebook else 4)
    if inputs.startswith("conv"):
        return LinearConfig(128, 64, 64, warps=8, stages=2 if codebook else 3, two_pass=tokens >= 1024)
    by_group = " g" in weight
    block_columns = 128 if inputs in ("int8", "fp8") and not by_group else 64
    # Decoding once per token tile costs more than writing the operand once when there are many token tiles.
    return LinearConfig(128, 128, block_columns, warps=8, stages=2 if codebook else 3, two_pass=tokens >= 1024)


def fit(
    key: Any,
    config: Config,
    launch: Callable[[Config], Result],
    smaller: Callable[[Config], Config | None] | None = None,
) -> Result:
    """Launch with the first of ever smaller configurations that the device has registers and shared memory for."""
    from triton.runtime.errors import OutOfResources

    from .launch import start_again

    fitting = _fitting.get((key, config), config)
    while True:
        try:
            result = launch(fitting)
        except OutOfResources:
            start_again()
            if (less := (smaller or _smaller)(fitting)) is None:
                raise
            fitting = less
        else:
            _fitting[key, config] = fitting
            return result


_fitting: dict[Any, Any] = {}


def _smaller(config: Any) -> Any:
    if config.stages > 1:
        return replace(config, stages=config.stages - 1)
    if config.block_tokens > 16:
        return replace(config, block_tokens=config.block_tokens // 2)
    return replace(config, block_rows=config.block_rows // 2) if config.block_rows > 16 else None


def _nearest(entries: list[dict[str, Any]], tokens: int, rows: int, columns: int) -> LinearConfig:
    def distance(entry: dict[str, Any]) -> tuple[float, float]:
        short = entry["tokens"] < tokens  # a tile for fewer tokens fits worse than one for more
        area = rows * columns / (entry["rows"] * entry["columns"])
        return (tokens / entry["tokens"] * 4 if short else entry["tokens"] / tokens, max(area, 1 / area))

    return LinearConfig(**min(entries, key=distance)["config"])


@lru_cache(maxsize=16)
def tuned(name: str) -> dict[str, list[dict[str, Any]]]:
    """The tuned table of a device, empty if none ships."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text())["linear"] if file.is_file() else {}


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """File name of a device's table: ``NVIDIA_H200``."""
    if device.type == "cpu":
        return "interpreter"
    return str(torch.get_device_module(device.type).get_device_properties(device).name).replace(" ", "_").replace("/", "_")


@lru_cache(maxsize=16)
def processors(name: str) -> int:
    """Multiprocessors of the current device, 1 under the interpreter."""
    if name == "interpreter":
        return 1
    properties: Any = torch.accelerator.current_accelerator() and torch.get_device_module().get_device_properties()
    count = getattr(properties, "multi_processor_count", None)
    return count or max(1, getattr(properties, "max_compute_units", 512) // 8)  # Intel counts vector engines, 8 to a core
