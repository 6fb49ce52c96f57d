"""Compiles the Triton kernels for GPUs that are not there, and reports what the assembler says about each.

    python kernels/tests/compile_kernels.py [cuda:90 ...]

Launches are recorded instead of run; every distinct one is compiled for each target. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import torch
import triton
from qdiff_kernels.gpu import configs, ops, weights
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.gpu.linear import Units
from qdiff_kernels.reference import Extras, Window
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:89": GPUTarget("cuda", 89, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "cuda:120": GPUTarget("cuda", 120, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Launch(NamedTuple):
    """One kernel launch: the function, its arguments by name, compiler options (``num_warps``, ...) and the grid."""

    function: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


class Specialisation(NamedTuple):
    """What Triton compiles for a launch: types and alignment of its arguments, and the values that are known then."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def function(self) -> JITFunction:
        found: JITFunction = getattr(importlib.import_module(self.module), self.name)
        return found


@contextmanager
def recorded(see: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collect kernel launches instead of running them; ``see`` is called with each and may raise what the device would."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launch = Launch(self, bound, options, tuple(grid(bound) if callable(grid) else grid))
        if see is not None:
            see(launch)
        launches.append(launch)

    original = JITFunction.run
    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def specialise(launch: Launch) -> Specialisation:
    """As the run time would: with the same specialisation on 1 and on multiples of 16."""
    function, arguments, options, _ = launch
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], kind: Kind) -> Any:
        if isinstance(value, tuple) and not kind.constant:
            items = [describe(item, (*path, i), kind) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if kind.constant or value is None or (kind.specialised and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if kind.specialised and _divisible(value):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"

    signature = {
        p.name: describe(arguments[p.name], (i,), Kind(p.is_constexpr, not p.do_not_specialize))
        for i, p in enumerate(function.params)
    }
    return Specialisation(function.fn.__module__, function.fn.__name__, signature, constants, attributes, options)


class Kind(NamedTuple):
    """How Triton takes one parameter of a kernel."""

    constant: bool
    specialised: bool


def _divisible(value: Any) -> bool:
    """Whether 16 divides an integer, or a tensor's address if its storage starts where allocators let it start."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile_specialisation(wanted: Specialisation, target: GPUTarget) -> Any:
    """Compile for a GPU that need not be there."""
    source = ASTSource(
        fn=wanted.function, signature=wanted.signature, constexprs=dict(wanted.constants), attrs=dict(wanted.attributes)
    )
    return triton.compile(source, target=target, options=dict(wanted.options))


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile one recorded launch."""
    return compile_specialisation(specialise(launch), target)


def resources(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a compiled kernel; the kind of matrix instruction it uses."""
    facts: dict[str, Any] = {"shared": compiled.metadata.shared}
    if target.backend != "cuda":
        return facts | {"matrix": "mfma" if "v_mfma" in compiled.asm["amdgcn"] else "-"}
    ptx = compiled.asm["ptx"]
    facts["matrix"] = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), "-")
    facts["block_scaled"] = "block_scale" in ptx
    log = assembler_log(ptx)
    found = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    if not found or not spills:
        raise RuntimeError(f"the assembler reported neither registers nor spills: {log[-500:]}")
    return facts | {"registers": int(found[1]), "spills": int(spills[1])}


def assembler_log(ptx: str) -> str:
    """What ptxas says about a program. Triton brings two of them, and which takes its PTX depends on Triton's version."""
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch
    log = ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell):
            command = [assembler.path, "-v", f"--gpu-name={arch[1]}", file.name, "-o", "/dev/null"]
            run = subprocess.run(command, capture_output=True, text=True)
            log = run.stdout + run.stderr
            if run.returncode == 0:
                break
    return log


H200 = 132  # multiprocessors


def rule(weight: str, inputs: str, tokens: int) -> LinearConfig:
    return replace(configs.rule(weight, inputs, tokens, 3072, 3072, H200), two_pass=False)


SMALL, SMALL_CODEBOOK = rule("integer4 g64", "bfloat16", 1), rule("codebook2x8d8 row", "bfloat16", 1)
LARGE, LARGE_CODEBOOK = rule("integer4 g64", "bfloat16", 512), rule("codebook2x8d8 row", "bfloat16", 512)
LARGE_8BIT, LARGE_CODEBOOK_8BIT = rule("integer8 row", "int8", 512), rule("codebook2x8d8 row", "int8", 512)
CONVOLUTION = rule("codebook", "conv bfloat16", 512)
PRODUCTS: dict[str, tuple[str, str, LinearConfig]] = {
    "W4A16 few tokens": ("int4-g64", "plain", SMALL),
    "W4A16": ("int4-g64", "plain", LARGE),
    "W4A8": ("int4-g64", "bias+low_rank+int8", LARGE),
    "W4A4, rank 32": ("int4-g64", "bias+low_rank+smooth+rotation+int4", LARGE),
    "W3A16 asymmetric": ("int3-asymmetric-g16", "bias", LARGE),
    "W8A8": ("int8-row", "int8", LARGE_8BIT),
    "FP4 A8": ("e2m1-g32-e8m0", "fp8", LARGE),
    "NVFP4 A16": ("e2m1-g16-e4m3-two-level", "plain", LARGE),
    "FP8 A8": ("e4m3-row", "rotation+fp8", LARGE_8BIT),
    "FP8 A8, one scale": ("e4m3-row", "low_rank+static+fp8", LARGE_8BIT),
    "FP4 two encodings": ("e2m1-or-e1m2-g16", "plain", LARGE),
    "2-bit codebook A16 few tokens": ("codebook-2x8-d8", "plain", SMALL_CODEBOOK),
    "2-bit codebook A16": ("codebook-2x8-d8", "plain", LARGE_CODEBOOK),
    "2-bit codebook A8": ("codebook-2x8-d8", "rotation+int8", LARGE_CODEBOOK_8BIT),
    "codebook of 11 bits": ("codebook-1x11-d4-tensor", "plain", LARGE_CODEBOOK),
}


UNITS = {
    "cuda:80": Units(bf16=True, fp8=False, block_scaled=False),
    "cuda:89": Units(bf16=True, fp8=True, block_scaled=False),
    "cuda:90": Units(bf16=True, fp8=True, block_scaled=False),
    "cuda:100": Units(bf16=True, fp8=True, block_scaled=True),
    "cuda:120": Units(bf16=True, fp8=True, block_scaled=True),
    "hip:gfx942": Units(bf16=True, fp8=False, block_scaled=False),
}


def launches_of(name: str, units: Units) -> list[Launch]:
    """Every kernel launch of one product, one dequantization and one convolution of a format."""
    variant, extras, config = PRODUCTS[name]
    packed = oracle.packed_weight(variant, 64, 256)
    weight = getattr(weights, packed.kind)(*packed.arguments, 256)
    values = Extras(**oracle.make_extras(extras, 64, 256, 256, rank=32))
    image = oracle.packed_weight(variant, 64, 9 * 64)
    kernel = getattr(weights, image.kind)(*image.arguments, 9 * 64)
    bare = Extras(values.bias, None, None, None, values.rotation and 64, values.activations)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    before: Callable[..., Units] = ops.matrix_units
    ops.matrix_units = lambda device: units  # type: ignore[assignment]
    try:
        with recorded() as launches:
            ops.product(weight, torch.zeros(32, 256, dtype=torch.bfloat16), values, config)
            ops.decode(weight, torch.bfloat16)
            ops.convolve(kernel, torch.zeros(2, 64, 8, 8, dtype=torch.bfloat16), bare, window, (8, 8), CONVOLUTION, units.fp8)
        return launches
    finally:
        ops.matrix_units = before  # type: ignore[assignment]


def compile_all(targets: list[str], names: list[str]) -> list[dict[str, Any]]:
    """One row per target, product and kernel."""
    rows = []
    for target in targets:
        for name in names:
            for launch in launches_of(name, UNITS[target]):
                compiled = compile_launch(launch, TARGETS[target])
                kernel = launch[0].__name__.strip("_").removesuffix("_kernel")
                rows.append({"target": target, "product": name, "kernel": kernel} | resources(compiled, TARGETS[target]))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--only", default="", help="part of a product's name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = compile_all(options.targets, [name for name in PRODUCTS if options.only in name])
    for row in table:
        print("  ".join(f"{value!s:<14}" if key != "product" else f"{value:<32}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
