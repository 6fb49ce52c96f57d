"""Numba intrinsics: raw memory, atomic counters and the vector instructions that loops in Python do not reach.

Vectors are LLVM's own, so most of this runs on any CPU. ``fast_lookup`` says whether the host has the AVX-512 instructions of
:func:`decode_levels` (Intel Ice Lake, AMD Zen 4 and later); where it has not, ``_kernels.py`` looks levels up one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic as numba_intrinsic

intrinsic: Any = numba_intrinsic  # its functions are called without the typing context, which type checkers do not know
I1, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
F32 = ir.FloatType()


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        return str(value)


_BFloat._create_instance()
BF16 = _BFloat()
# Number formats of a kernel's results. These numbers are part of a job.
STORED = {"float32": F32, "bfloat16": BF16, "float16": ir.HalfType(), "int8": I8}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """Names of the features that numba compiles for, as LLVM calls them: the host's unless NUMBA_CPU_FEATURES is set."""
    features: str | None = vars(config)["CPU_FEATURES"]
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def fast_lookup() -> bool:
    """Whether the host shuffles bytes and words across a whole 512-bit register and converts to bfloat16."""
    return {"avx512f", "avx512bw", "avx512vbmi", "avx512bf16"} <= host_features()


def fast_dot() -> bool:
    """Whether the host multiplies pairs of bfloat16 into float32 sums."""
    return {"avx512f", "avx512bf16"} <= host_features()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def constant_vector(element: ir.Type, values: list[int]) -> ir.Constant:
    return ir.Constant(vector(element, len(values)), values)


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector with ``value`` in every element."""
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, constant_vector(I32, [0] * count))


def call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call an LLVM intrinsic by name."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, arguments)


def load(builder: Any, address: Any, kind: ir.Type) -> Any:
    """Load from an integer address, with no alignment assumed."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def element(builder: Any, address: Any, index: Any, kind: ir.Type) -> Any:
    """Pointer to an element. Indexing one base lets loops be vectorised, which arithmetic on addresses does not."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def to_stored(builder: Any, value: Any, out: str) -> Any:
    """Convert a float32 scalar or vector to the stored type; int8 by rounding half to even, saturated."""
    kind = STORED[out]
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    if out == "float32":
        return value
    if out == "bfloat16" and not {"avx512bf16", "avx512vl"} <= host_features():
        return _round_to_bfloat16(builder, value, count)
    if out != "int8":
        return builder.fptrunc(value, vector(kind, count) if count else kind)
    suffix = f"v{count}f32" if count else "f32"
    for name, limit in (("minnum", 127.0), ("maxnum", -128.0)):  # NaN becomes 127: its row's scale is NaN
        bound = ir.Constant(vector(F32, count), [limit] * count) if count else F32(limit)
        value = call(builder, f"llvm.{name}.{suffix}", value.type, value, bound)
    rounded = call(builder, f"llvm.rint.{suffix}", value.type, value)
    return builder.fptosi(rounded, vector(I8, count) if count else I8)


@intrinsic
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Atomically add to the int64 at an address and return its former value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


def _reader(kind: ir.Type, result: Any, convert: Any) -> Any:
    @intrinsic
    def read(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return convert(builder, builder.load(element(builder, arguments[0], arguments[1], kind), align=1))

        return result(types.int64, types.int64), codegen

    return read


read_u8 = _reader(I8, types.int64, lambda b, v: b.zext(v, I64))
read_i8 = _reader(I8, types.int64, lambda b, v: b.sext(v, I64))
read_i32 = _reader(I32, types.int64, lambda b, v: b.sext(v, I64))
read_u32 = _reader(I32, types.int64, lambda b, v: b.zext(v, I64))
read_f32 = _reader(F32, types.float32, lambda b, v: v)
read_f16 = _reader(ir.HalfType(), types.float32, lambda b, v: b.fpext(v, F32))
read_bf16 = _reader(I16, types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, I32), I32(16)), F32))


@intrinsic(prefer_literal=True)
def write(typingctx: Any, address: Any, index: Any, value: Any, out: Any) -> Any:
    """Store float32 ``value`` as element ``index`` of an array of ``out`` ("float32", "bfloat16", "float16", "int8")."""
    name = out.literal_value

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = to_stored(builder, arguments[2], name)
        builder.store(value, element(builder, arguments[0], arguments[1], STORED[name]), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, out), codegen


def _round_to_bfloat16(builder: Any, value: Any, count: int) -> Any:
    """Half to even in integers: without the instruction LLVM would call a function that numba does not have."""

    def constant(number: int) -> Any:
        return constant_vector(I32, [number] * count) if count else I32(number)

    bits = builder.bitcast(value, vector(I32, count) if count else I32)
    upper = builder.lshr(bits, constant(16))
    odd = builder.and_(upper, constant(1))
    rounded = builder.lshr(builder.add(builder.add(bits, odd), constant(0x7FFF)), constant(16))
    quiet = builder.or_(upper, constant(0x40))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.bitcast(builder.trunc(chosen, vector(I16, count) if count else I16), vector(BF16, count) if count else BF16)


def _writer(kind: ir.Type) -> Any:
    @intrinsic
    def write_integer(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.trunc(arguments[2], kind) if kind is not I32 else arguments[2]
            builder.store(value, element(builder, arguments[0], arguments[1], kind), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int32), codegen

    return write_integer


write_i8, write_i16, write_i32 = _writer(I8), _writer(I16), _writer(I32)


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """``memcpy``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = [builder.inttoptr(a, I8.as_pointer()) for a in arguments[:2]]
        call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, arguments[2], I1(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero_bytes(typingctx: Any, target: Any, count: Any) -> Any:
    """``memset`` to zero."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I8.as_pointer())
        call(builder, "llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), arguments[1], I1(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def bits_float(typingctx: Any, value: Any) -> Any:
    """The float32 of an int32's bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), codegen


@intrinsic
def rint(typingctx: Any, value: Any) -> Any:
    """Round a float32 half to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.rint.f32", F32, arguments[0])

    return types.float32(types.float32), codegen
