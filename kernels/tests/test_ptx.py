"""What runs compiled kernels without a GPU: instructions, the order of threads, and the faults that it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import floats, instructions, machine, text

HEAD = ".visible .entry _k(\n\t.param .u64 .ptr .global .align 1 _k_param_0,\n\t.param .u32 _k_param_1\n)\n.reqntid {threads}\n{{\n"
DECLARED = "\t.reg .pred %p<9>;\n\t.reg .b16 %rs<99>;\n\t.reg .b32 %r<99>;\n\t.reg .b64 %rd<99>;\n"
OUT = "ld.param.b64 %rd1, [_k_param_0];\nmov.u32 %r1, %tid.x;\n"


def run(body: str, memory: np.ndarray, number: int = 0, threads: int = 32, ctas: int = 1, shared: int = 4096) -> np.ndarray:
    """Run statements on ``memory``, whose address is the first parameter; the second is ``number``. Returns ``memory``."""
    program = text.parse(HEAD.format(threads=threads) + DECLARED + OUT + body + "\nret;\n}\n")
    space = machine.GlobalMemory()
    space.add(1 << 20, memory.view(np.uint8).reshape(-1), "memory")
    arguments = {"_k_param_0": 1 << 20, "_k_param_1": number}
    machine.Machine(program, instructions.steps_of(program), (ctas, 1, 1), arguments, space, shared).run()
    return memory


def calculated(instruction: str, *operands: int, bits: int = 32) -> int:
    """Bits of ``%r9`` or ``%rd9`` after an instruction on literals."""
    target = "%rd9" if bits == 64 else "%r9"
    body = f"{instruction} {target}, {', '.join(map(str, operands))};\nst.global.b{bits} [%rd1], {target};"
    return int(run(body, np.zeros(1, f"u{bits // 8}"))[0])


def bits_of(number: float, kind: str = "f4") -> int:
    return int(np.array(number, kind).view(f"u{kind[1]}"))


def float_operands(*numbers: float) -> tuple:
    return tuple(f"0f{bits_of(number):08X}" for number in numbers)


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("shr.s32", (-8, 40), -1),
        ("shr.u32", (-8, 40), 0),
        ("shl.b32", (3, 32), 0),
        ("bfe.s32", (0xF0, 4, 4), -1),
        ("bfe.u32", (0xF0, 4, 4), 15),
        ("prmt.b32", (0x44332211, 0x88776655, 0x7531), 0x88664422),
        ("prmt.b32", (0x80, 0, 0x8888), 0xFFFFFFFF),
        ("min.s32", (-1, 1), -1),
        ("mad.lo.s32", (3, -4, 5), -7),
        ("add.f32", float_operands(1.5, 2.25), bits_of(3.75)),
        ("max.f32", float_operands(float("nan"), 2.0), bits_of(2.0)),
        ("cvt.rzi.s32.f32", float_operands(-2.9), -2),
        ("cvt.rzi.s32.f32", float_operands(1e30), 2**31 - 1),
        ("cvt.rn.bf16x2.f32", float_operands(1.0, -2.0), 0x3F80C000),
        ("fma.rn.f32", float_operands(1 + 2**-12, 1 + 2**-12, -1.0), bits_of(2**-11 + 2**-24)),
    ],
)
def test_an_instruction_gives_what_the_manual_says(instruction, operands, expected):
    assert calculated(instruction, *operands) == expected & 0xFFFFFFFF


def test_wide_products_keep_their_sign():
    assert calculated("mul.wide.s32", -3, 5, bits=64) == (1 << 64) - 15
    assert calculated("mul.wide.u32", -3, 5, bits=64) == ((1 << 32) - 3) * 5


def test_bfloat16_rounds_to_the_nearest_even_number():
    values = torch.randn(4096) * torch.logspace(-42, 38, 4096)
    found = floats.narrow(values.numpy())
    assert np.array_equal(found, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    exact = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8], np.float64)  # rounded twice, the first would be a tie as well
    assert floats.widen(floats.narrow(exact)).tolist() == [1 + 2.0**-7, 1.0]


def test_e4m3_codes_are_what_torch_says():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(floats.e4m3(codes), expected, equal_nan=True)
    numbers = expected[np.isfinite(expected)]
    assert np.array_equal(floats.e4m3(floats.to_e4m3(numbers)), numbers)
    assert calculated("cvt.rn.f16x2.e4m3x2", 0xB840) == 0xBC004000  # -1 and 2
    assert calculated("cvt.rn.satfinite.e4m3x2.f32", *float_operands(1e9, 0.001)) == 0x7E01


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "s8"])
def test_fragments_of_the_matrix_unit_are_where_ldmatrix_puts_them(kind, transposed):
    """A [16, K] row by row and B^T [8, K], or B [K, 8], through ldmatrix and mma, against the product."""
    if transposed and kind == "s8":
        pytest.skip("ldmatrix transposes 16-bit numbers only")
    random = np.random.default_rng(0)
    depth, bits = (16, 16) if kind == "bf16" else (32, 8)
    a, b = random.integers(-7, 8, (16, depth)), random.integers(-7, 8, (depth, 8))
    stored_b = b if transposed else b.T

    def stored(matrix: np.ndarray) -> np.ndarray:
        flat = np.ascontiguousarray(matrix)
        return floats.narrow(flat.astype(np.float32)).view(np.uint8) if bits == 16 else flat.astype(np.int8).view(np.uint8)

    memory = np.concatenate([stored(a).reshape(-1), stored(stored_b).reshape(-1), np.zeros(16 * 8 * 4, np.uint8)])
    size = depth * bits // 8  # of a row of A, 32 bytes
    assert size == 32
    if transposed:  # rows of B, 16 bytes each
        rows_of_b = "and.b32 %r20, %r1, 15; shl.b32 %r20, %r20, 4;"
    else:  # the halves of the rows of B^T
        rows_of_b = "and.b32 %r20, %r1, 7; shl.b32 %r20, %r20, 5; bfe.u32 %r21, %r1, 3, 1; shl.b32 %r21, %r21, 4;"
        rows_of_b += "add.s32 %r20, %r20, %r21;"
    shape, number, into = ("m16n8k16", "bf16.bf16", "f32") if kind == "bf16" else ("m16n8k32.row.col.satfinite", "s8.s8", "s32")
    shape = shape if kind == "s8" else f"{shape}.row.col"
    d, a4, zeros = "{%r40, %r41, %r42, %r43}", "{%r12, %r13, %r14, %r15}", "{%r30, %r30, %r30, %r30}"
    body = f"""
shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;
ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd3]; st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
setp.lt.s32 %p1, %r1, 16;
@%p1 ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd3+512]; @%p1 st.shared.v4.b32 [%r2+512], {{%r3, %r4, %r5, %r6}};
bar.sync 0;
and.b32 %r10, %r1, 15; shl.b32 %r10, %r10, 5; shr.u32 %r11, %r1, 4; shl.b32 %r11, %r11, 4; add.s32 %r10, %r10, %r11;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r12, %r13, %r14, %r15}}, [%r10];
{rows_of_b}
ldmatrix.sync.aligned.m8n8.x2{".trans" if transposed else ""}.shared.b16 {{%r22, %r23}}, [%r20+512];
mov.b32 %r30, 0;
mma.sync.aligned.{shape}.{into}.{number}.{into} {d}, {a4}, {{%r22, %r23}}, {zeros};
shr.u32 %r50, %r1, 2; shl.b32 %r50, %r50, 5; and.b32 %r51, %r1, 3; shl.b32 %r51, %r51, 3; add.s32 %r50, %r50, %r51;
cvt.u64.u32 %rd5, %r50; add.s64 %rd6, %rd1, %rd5;
st.global.v2.b32 [%rd6+768], {{%r40, %r41}}; st.global.v2.b32 [%rd6+1024], {{%r42, %r43}};
"""
    found = run(body, memory)[768:].view(np.float32 if kind == "bf16" else np.int32).reshape(16, 8)
    assert np.array_equal(found, a @ b)


def test_threads_that_part_meet_again():
    """Odd threads take a way of their own; a loop runs as often as each thread wants."""
    body = """
and.b32 %r2, %r1, 1; setp.eq.b32 %p1, %r2, 0; mov.b32 %r3, 7; @%p1 bra $even;
mov.b32 %r3, 9;
$even:
mov.b32 %r4, 0;
$loop:
add.s32 %r3, %r3, 1; add.s32 %r4, %r4, 1; setp.lt.s32 %p2, %r4, %r1; @%p2 bra $loop;
shl.b32 %r5, %r1, 2; cvt.u64.u32 %rd2, %r5; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r3;
"""
    found = run(body, np.zeros(32, np.int32))
    assert found.tolist() == [(9 if i % 2 else 7) + max(1, i) for i in range(32)]


SHARED = "shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1;"
NEXT_WARP = "add.s32 %r3, %r1, 32; and.b32 %r3, %r3, 63; shl.b32 %r3, %r3, 2; ld.shared.b32 %r4, [%r3];"
COPY = "shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;"
COPY += "cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd1+4096];", r"4096 bytes after the beginning of memory, which has 4096"),
        ("st.global.b32 [%rd1+-4], %r1;", r"-4 bytes after the beginning"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+8];", r"not aligned to 16 bytes"),
        ("ld.shared.b32 %r3, [0];", r"nothing has written"),
        ("ld.shared.b32 %r3, [%r1+8192];", r"not aligned|8192"),
        (SHARED + NEXT_WARP, r"another warp has written since the last barrier"),
        (SHARED + "bar.sync 0;" + NEXT_WARP + "st.shared.b32 [%r2], %r1;", r"another warp has read since the last barrier"),
        ("mov.b32 %r2, 0; st.shared.b32 [%r2], %r1;", r"different numbers at once"),
        (COPY + "cp.async.commit_group; ld.shared.b32 %r4, [%r2];", r"has not been waited for"),
        (COPY + "cp.async.wait_group 0; ld.shared.b32 %r4, [%r2];", r"has not been waited for"),
        (COPY + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r4, [%r2];", r"has not been waited for"),
        ("setp.lt.s32 %p1, %r1, 40; @%p1 bar.sync 0;", r"some threads of a CTA do not reach"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", r"some threads of a warp"),
        ("$loop: bra $loop;", r"no end"),
    ],
)
def test_what_a_gpu_would_not_do_is_a_fault(monkeypatch, body, message):
    monkeypatch.setattr(machine, "STEPS", 1000)
    with pytest.raises(machine.Fault, match=message):
        run(body, np.zeros(1024, np.int32), threads=64)


def test_shared_memory_with_barriers_and_copies_that_are_waited_for():
    body = SHARED + "bar.sync 0;" + NEXT_WARP + "bar.sync 0;" + COPY
    body += "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; xor.b32 %r5, %r2, 512; ld.shared.b32 %r6, [%r5];"
    body += "add.s32 %r6, %r6, %r4; st.global.b32 [%rd3], %r6;"
    memory = np.arange(256, dtype=np.int32)
    found = run(body, memory.copy(), threads=64)
    expected = [(i + 32) % 64 + 4 * (i ^ 32) for i in range(64)]
    assert found[::4].tolist() == expected


def test_an_instruction_that_is_not_known_is_named():
    with pytest.raises(instructions.Unknown, match=r"wgmma\.fence"):
        run("wgmma.fence.sync.aligned;", np.zeros(4, np.int32))


def test_compiled_kernels_give_what_the_definition_says():
    """A part of test_gpu.py on kernels compiled for 8.0, run instruction by instruction, every address and barrier checked."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    chosen = [
        "test_gpu.py::test_linear_matches_the_definition[int4-g64-bias+low_rank+smooth+rotation]",
        "test_gpu.py::test_linear_matches_the_definition[e2m1-g16-e4m3-two-level-low_rank+int4]",
        "test_gpu.py::test_sizes_that_fill_no_group_no_vector_and_no_tile[codebook-3x5-d3-int8-int8-(9, 129)]",
        "test_gpu.py::test_conv2d_matches_the_definition[codebook-2x8-d8-bias+low_rank+int8-3x3]",
        "test_gpu.py::test_a_packed_weight_is_decoded_exactly[e1m2uz-g16-(33, 129)]",
        "test_gpu.py::test_columns_split_over_programs_add_up_to_the_same[codebook-2x8-d8]",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / each) for each in chosen)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"QDIFF_COMPILED_FOR": "cuda:80"})
    assert run.returncode == 0, run.stdout[-4000:]
    assert run.stdout.startswith("." * len(chosen))
