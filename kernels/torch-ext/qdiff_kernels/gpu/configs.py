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
    stages of a codebook's look-ups overflow shared memory. Whether the weight is decoded first is left to :func:`decodes_first`.
    """
    codebook = weight.startswith("codebook")
    if "float32" in inputs and tokens > 16:  # no matrix unit takes float32 as it is: leave the product to the vendor's library
        return LinearConfig(32, 64, 64, stages=2, two_pass=True)
    if inputs.startswith("conv"):
        if tokens <= 128:
            return _few_tokens(tokens, rows, columns, multiprocessors, codebook)
        return LinearConfig(128, 64, 64, warps=8, stages=2 if codebook else 3, two_pass=tokens >= 1024)
    eight_bit = inputs in ("int8", "fp8") and " row" in weight
    if tokens <= 128:
        config = _few_tokens(tokens, rows, columns, multiprocessors, codebook)
    else:
        block_columns = 128 if eight_bit and not codebook else 64
        # With a scale for each token and group beside each sum, 128 tokens are more than the registers of 10.0 hold.
        block_tokens = 64 if inputs == "int4" else 128
        config = LinearConfig(block_tokens, 128, block_columns, warps=8, stages=2 if codebook else 3)
    first = tokens >= MANY_TOKENS and decodes_first(config, weight, inputs, tokens, rows, columns, multiprocessors)
    if first and eight_bit:  # what is multiplied then is dense, whatever it was decoded from
        config = replace(config, block_columns=128, stages=3)
    return replace(config, two_pass=first)


def _few_tokens(tokens: int, rows: int, columns: int, multiprocessors: int, codebook: bool) -> LinearConfig:
    """Reading the weight is what takes the time: enough programs at once to keep its bytes coming.

    A program of 4 warps has ``stages - 1`` blocks of 64 x 64 codes under way, 4 KB at 4 bits, where 4.3 TB/s at a latency of 1 us
    want 32 KB on each multiprocessor. So columns are split until there are PROGRAMS of them on each, but no further than to 4
    blocks, which hide the latency of the first, and to partial sums of as many bytes, written and read, as there are weights.
    """
    block_tokens = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    tiles = -(-rows // 64) * -(-tokens // block_tokens)
    splits = max(1, min(16, -(-PROGRAMS * multiprocessors // tiles), columns // 256, columns // (8 * block_tokens)))
    return LinearConfig(block_tokens, 64, 64, splits, warps=4, stages=2 if codebook else 4)


MANY_TOKENS = 128
PROGRAMS = 4  # of 4 warps that a multiprocessor holds at a time: 64 to 128 registers a thread
# The model of a product's time, in microseconds on an H200. Counted in the compiled code are instructions; assumed are the clock,
# what the vendor's library reaches, bandwidth and launches. Only differences between two ways matter, and they hold on other GPUs
# as far as the ratio of matrix units to other instructions does. No GPU has confirmed them. docs/development/gpu_kernels.md
CLOCK = 1750.0  # cycles in a microsecond
LANES = 128  # instructions of one weight that a multiprocessor issues in a cycle
PRODUCTS = {2: 2048, 1: 4096}  # multiply-adds in a cycle of a multiprocessor, by bytes of an operand
VENDOR = 0.83  # of which the vendor's library reaches this share
BYTES = 18.6  # from memory in a cycle of a multiprocessor
SHARED_BYTES = 32.0  # from the second-level cache
SYNCHRONIZE = 120.0  # cycles between a block's decoding and the next
LAUNCH = 2.5
# Instructions that decode one weight, its scale included; a codebook's also stand for waiting for its entries.
INSTRUCTIONS = {"integer": 9.0, "minifloat": 16.0, "codebook": 22.0}
READY = 1.0  # the same for INT8 codes with one scale a row


def decodes_first(
    config: LinearConfig, weight: str, inputs: str, tokens: int, rows: int, columns: int, multiprocessors: int
) -> bool:
    """Whether decoding the weight to memory and then multiplying takes less time by the model than doing both at once."""
    minifloat = weight.startswith("minifloat")
    eight_bit = " row" in weight and (inputs == "fp8" if minifloat else inputs == "int8")
    decoding = next(count for kind, count in INSTRUCTIONS.items() if weight.startswith(kind))
    fused = READY if weight == "integer8 row" and inputs == "int8" else decoding
    shape = (tokens, rows, columns, multiprocessors)
    written = rows * columns * (1 if eight_bit else 2)
    first = LAUNCH + max(decoding * rows * columns / LANES, written / BYTES) / (CLOCK * multiprocessors)
    if not eight_bit:
        dequantize = (
            0.0 if inputs.startswith(("float", "bfloat")) else LAUNCH + 3 * tokens * columns / BYTES / (CLOCK * multiprocessors)
        )
        return first + dequantize + _vendor_time(*shape) < _fused_time(config, fused, 2, *shape)
    after = _vendor_time(*shape, itemsize=1) if inputs == "fp8" else _fused_time(config, 0.0, 1, *shape)
    return first + after < _fused_time(config, fused, 1, *shape)


def _vendor_time(tokens: int, rows: int, columns: int, multiprocessors: int, itemsize: int = 2) -> float:
    """Tiles of 128 x 256, split where they do not fill the device."""
    tiles = -(-rows // 128) * -(-tokens // 256)
    full = (
        tiles / multiprocessors / -(-tiles // multiprocessors) if tiles > multiprocessors else min(1.0, 2 * tiles / multiprocessors)
    )
    products = rows * columns * tokens / (PRODUCTS[itemsize] * VENDOR * max(full, 0.35))
    moved = itemsize * (rows * columns + tokens * columns) + 2 * tokens * rows
    return LAUNCH + max(products, moved / BYTES) / (CLOCK * multiprocessors)


def _fused_time(
    config: LinearConfig, instructions: float, itemsize: int, tokens: int, rows: int, columns: int, multiprocessors: int
) -> float:
    """Programs decode and multiply block after block; of those on one multiprocessor, one may decode while another multiplies."""
    size = config.block_rows * config.block_columns
    products = size * config.block_tokens / PRODUCTS[itemsize]
    other = max(size * instructions / LANES, (size + config.block_tokens * config.block_columns) * itemsize / SHARED_BYTES)
    programs = -(-rows // config.block_rows) * -(-tokens // config.block_tokens) * config.splits
    blocks = -(-columns // config.block_columns) / config.splits
    together = min(PROGRAMS if config.warps <= 4 else 1, -(-programs // multiprocessors))
    block = max(together * max(products, other), products + other + SYNCHRONIZE)
    waves = -(-programs // (multiprocessors * together))
    return LAUNCH * (1 + (config.splits > 1)) + waves * blocks * block / CLOCK


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
