"""The compiled CPU implementation against the layer's definition in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import SimpleNamespace

import oracle
import pytest
import torch
from qdiff_kernels import implementations, minifloat_linear, pack_bits, use
from qdiff_kernels.integer import integer_linear

pytest.importorskip("numba")

ROWS, COLUMNS = 37, 208  # no multiple of a row block, a vector of 32 columns, or a group of 64
WHOLE = 192  # columns that fill blocks of 64
EXTRAS = ["plain", "bias+low_rank+smooth+rotation", "int8", "bias+low_rank+smooth+rotation+int8", "rotation+fp8", "low_rank+int4"]
EXTRAS += ["low_rank+smooth+shift+int4", "bias+nvfp4", "bias+static+int8", "shift+static+fp8"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
FEW, MANY = (1, 2, 3, 17), (33, 70)  # tokens on either side of every threshold


@lru_cache(maxsize=64)
def weight_of(variant: str, rows: int = ROWS, columns: int = COLUMNS) -> oracle.Packed:
    return oracle.packed_weight(variant, rows, columns)


def run(weight: oracle.Packed, x: torch.Tensor, extras: dict) -> torch.Tensor:
    with use("cpu"):
        return oracle.LINEAR[weight.kind](x, *weight.arguments, *extras.values())


def tolerance(dtype: torch.dtype, extras: dict) -> float:
    """A value halfway between two INT4 codes may be rounded either way, which shows where a dot product is short."""
    coarse = {"none": 0.0, "int4": 5e-2}.get(extras["activations"], 2e-2)
    return max(coarse, TOLERANCE[dtype])


@pytest.fixture(params=["integers", "bfloat16", "decoded"])
def path(request, monkeypatch):
    """Force one strategy for the product, whatever the number of tokens: packed, in integers or bfloat16, or decoded for torch."""
    from qdiff_kernels.cpu import _linear

    monkeypatch.setattr(_linear, "few_tokens", lambda *_: 0 if request.param == "decoded" else 10**9)
    monkeypatch.setattr(_linear, "integer_tokens", lambda *_: 10**9 if request.param == "integers" else 0)
    return request.param


def test_every_op_runs_compiled_on_the_cpu():
    for op, row in implementations().items():
        assert row["cpu"] == "cpu", op


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_linear_matches_the_definition_on_either_path(variant, extras, path):
    for columns, dtype in ((COLUMNS, torch.bfloat16), (COLUMNS, torch.float32), (WHOLE, torch.bfloat16), (WHOLE, torch.float16)):
        weight, chosen = weight_of(variant, ROWS, columns), oracle.make_extras(extras, ROWS, columns, columns)
        x = torch.randn(9, columns).to(dtype)
        y = run(weight, x, chosen)
        assert (y.shape, y.dtype) == ((9, ROWS), dtype)
        assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance(dtype, chosen)


@pytest.mark.parametrize("tokens", [*FEW, *MANY])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize(
    "variant", ["codebook-2x8-d8", "codebook-3x5-d3-int8", "e2m1-g16-e4m3-two-level", "int4-g64", "int8-row", "int8-asymmetric-row"]
)
def test_any_number_of_tokens(variant, extras, tokens):
    weight, chosen = weight_of(variant), oracle.make_extras(extras, ROWS, COLUMNS, COLUMNS)
    for dtype in TOLERANCE:
        x = torch.randn(tokens, COLUMNS).to(dtype)
        error = oracle.relative_error(run(weight, x, chosen), oracle.linear(x, weight.dense, chosen))
        assert error < tolerance(dtype, chosen), dtype


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (2, 65), (9, 129), (5, 320)], ids=str)
@pytest.mark.parametrize("activations", ["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_sizes_that_fill_no_group_and_no_vector(variant, activations, shape, path):
    weight = weight_of(variant, *shape)
    chosen = oracle.make_extras(f"bias+low_rank+{activations}", *shape, shape[1], rank=1)
    x = torch.randn(3, shape[1]).bfloat16()
    assert oracle.relative_error(run(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 3e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_dequantize_rounds_the_exact_value_once(variant, dtype):
    weight = weight_of(variant)
    with use("cpu"):
        dense = oracle.DEQUANTIZE[weight.kind](*weight.arguments, COLUMNS, dtype)
    exact = weight.dense
    assert ((dense.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("extras", ["plain", "bias+low_rank+smooth+rotation+int8", "int4"])
def test_non_contiguous_inputs_give_the_result_of_a_copy(extras):
    weight, chosen = weight_of("e2m1-g32-e8m0", 6, 64), oracle.make_extras(extras, 6, 64, 64)
    for x in (
        torch.randn(64, 9).T,
        torch.randn(5, 4, 64).transpose(0, 1),
        torch.randn(4, 128)[:, ::2],
        torch.randn(64).expand(3, 64),
    ):
        y = run(weight, x, chosen)
        assert y.is_contiguous()
        assert torch.allclose(y, run(weight, x.contiguous(), chosen), atol=1e-5)  # torch's own product of the branch differs


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_non_contiguous_weights_are_read_by_value(variant, path):
    weight = weight_of(variant)
    strided = tuple(a.T.contiguous().T if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in weight.arguments)
    x = torch.randn(2, COLUMNS)
    assert torch.equal(run(weight._replace(arguments=strided), x, oracle.NO_EXTRAS), run(weight, x, oracle.NO_EXTRAS))


@pytest.mark.parametrize("activations", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_reaches_the_output_of_its_token_only(activations, dtype, path):
    weight, chosen = weight_of("int4-g64"), oracle.NO_EXTRAS | {"activations": activations}
    x = torch.randn(3, COLUMNS).to(dtype)
    x[1, 7] = float("nan")
    y = run(weight, x, chosen)
    assert torch.isfinite(y[[0, 2]]).all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-30, 1e30])
@pytest.mark.parametrize("activations", ["none", "int8", "fp8", "int4"])
def test_magnitudes_at_the_edges_of_float32(activations, magnitude, path):
    weight, chosen = weight_of("int4-g64"), oracle.NO_EXTRAS | {"activations": activations}
    x = torch.randn(2, COLUMNS).sign() * magnitude
    y = run(weight, x, chosen)
    expected = oracle.linear(x, weight.dense, chosen)
    allowed = 2e-2 * float(expected.abs().max()) + (1e-36 if magnitude < 1e-37 else 0.0)  # denormals may count as zero
    assert float((y.double() - expected).abs().max()) <= allowed


def test_the_largest_bfloat16_does_not_overflow_inside(path):
    weight = weight_of("e2m1-g16-e4m3-two-level")
    x = torch.zeros(2, COLUMNS).bfloat16()
    x[:, 3] = torch.finfo(torch.bfloat16).max
    y = run(weight, x, oracle.NO_EXTRAS)
    expected = oracle.linear(x, weight.dense, oracle.NO_EXTRAS)
    within = expected.abs() < 3e38
    assert torch.isfinite(y[within]).all()


def test_extreme_scales_of_a_row_leave_its_neighbours_alone(path):
    codes = pack_bits(torch.randint(0, 16, (3, 64)), 4)
    scales = torch.tensor([[0.0], [6e-8], [65504.0]]).half()
    x = torch.randn(2, 64).bfloat16()
    for activations in ("none", "int8"):
        extras = oracle.NO_EXTRAS | {"activations": activations}
        with use("cpu"):
            y = integer_linear(x, codes, scales, None, 4, 64, *extras.values())
        with use("torch"):
            expected = integer_linear(x.float(), codes, scales, None, 4, 64, *extras.values())
        for row in range(3):
            assert oracle.relative_error(y[:, row], expected[:, row].double()) < 2e-2


@pytest.mark.parametrize("extras", ["plain", "int8", "smooth+rotation+int8"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "int4-g64", "e2m1-g16-e4m3-two-level"])
def test_the_result_does_not_depend_on_the_number_of_threads(variant, extras, path):
    weight, chosen = weight_of(variant, 70, 256), oracle.make_extras(extras, 70, 256, 256)
    x = torch.randn(40, 256)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(weight, x, chosen))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("extras", ["int8", "bias+low_rank+smooth+rotation+int8"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-g16-e4m3-two-level", "int8-row", "int8-asymmetric-row"])
def test_the_result_does_not_depend_on_how_rows_and_tokens_are_cut(variant, extras, monkeypatch):
    from qdiff_kernels.cpu import _linear

    monkeypatch.setattr(_linear, "few_tokens", lambda *_: 0)
    monkeypatch.setattr(_linear, "integer_tokens", lambda *_: 0)
    weight, chosen = weight_of(variant), oracle.make_extras(extras, ROWS, COLUMNS, COLUMNS)
    x = torch.randn(40, COLUMNS)
    whole = run(weight, x, chosen)
    products, of_torch = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *a, **k: (products.append(1), of_torch(*a, **k))[1])
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 16)
    monkeypatch.setattr(_linear, "SUM_BYTES", 4 * 16 * 24)
    monkeypatch.setattr(_linear, "LEAST_TOKENS", 17)
    assert torch.equal(run(weight, x, chosen), whole)
    assert len(products) == 2 + 2 + 1  # 16, 16 and 5 rows; 24 and 16 tokens, or all of them


def test_a_token_alone_gives_what_it_gives_among_others():
    weight = weight_of("int4-g64")
    x = torch.randn(7, COLUMNS).bfloat16()
    together = run(weight, x, oracle.NO_EXTRAS)
    assert all(torch.equal(run(weight, x[i : i + 1], oracle.NO_EXTRAS), together[i : i + 1]) for i in range(2, 7))


def test_several_python_threads_may_call_at_once(path):
    weight, chosen = weight_of("codebook-2x8-d8"), oracle.make_extras("smooth+rotation+int8", ROWS, COLUMNS, COLUMNS)
    inputs = [torch.randn(5, COLUMNS) for _ in range(24)]
    expected = [run(weight, x, chosen) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        actual = list(pool.map(lambda x: oracle.LINEAR[weight.kind](x, *weight.arguments, *chosen.values()), inputs))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_threads_without_openmp_give_the_same_result(monkeypatch, path):
    from qdiff_kernels.cpu import _threads

    weight, x = weight_of("int4-g64", 70, 256), torch.randn(40, 256)
    before = torch.get_num_threads()
    expected = run(weight, x, oracle.NO_EXTRAS)
    monkeypatch.setattr(_threads, "_gomp_parallel", lambda: None)
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(weight, x, oracle.NO_EXTRAS), expected)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernels_do_not_take_runs_on_torch():
    weight = weight_of("int4-g64")
    x = torch.randn(2, COLUMNS, dtype=torch.float64)
    assert (
        oracle.relative_error(oracle.LINEAR["integer"](x, *weight.arguments, *oracle.NO_EXTRAS.values()), x @ weight.dense.T)
        < 1e-12
    )
    with pytest.raises(ValueError, match="does not take"):
        run(weight, x, oracle.NO_EXTRAS)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_with_one_scale_for_all_are_multiplied_without_decoding_first(monkeypatch, kind, path):
    from qdiff_kernels import cpu

    weight, chosen = weight_of("int8-row", 5, 64), oracle.make_extras(f"static+{kind}", 5, 64, 64)
    monkeypatch.setattr(cpu.reference, "linear", lambda *_: pytest.fail("decoded"))
    x = torch.randn(4, 64).bfloat16()
    x[1, 7], x[2, 9] = float("inf"), -float("inf")
    y = run(weight, x, chosen)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("geometry", [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (1, 2, 0, 1)], ids=str)
@pytest.mark.parametrize("extras", ["plain", "bias+low_rank+smooth+rotation", "bias+low_rank+smooth+rotation+int8", "int4"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-g16-e4m3-two-level", "int4-g64"])
def test_conv2d_matches_the_definition(variant, extras, geometry):
    kernel, stride, padding, dilation = geometry
    columns = 32 * kernel * kernel
    weight = weight_of(variant, 7, columns)
    chosen = oracle.make_extras(extras, 7, columns, 32)
    window = tuple([value] * 2 for value in (kernel, stride, padding, dilation))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 32, 9, 6).to(dtype)
        with use("cpu"):
            y = oracle.CONV2D[weight.kind](x, *weight.arguments, *chosen.values(), *window)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, chosen, window)) < tolerance(dtype, chosen)


def test_importing_the_package_does_not_import_numba():
    code = "import sys, qdiff_kernels; assert 'numba' not in sys.modules and 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_process_at_a_time_reads_and_writes_the_kernel_cache(monkeypatch, tmp_path):
    from qdiff_kernels.cpu import _compile

    lock = _compile.FileLock(tmp_path / "lock")
    monkeypatch.setattr(_compile, "cache_lock", lambda: lock)
    held = []
    monkeypatch.setattr(
        _compile, "cfunc", lambda *_, **__: lambda function: held.append(lock.is_locked) or SimpleNamespace(ctypes=function)
    )
    assert _compile.kernel(run) is run
    assert held == [True] and not lock.is_locked


MULTIPLY = """
import oracle, sys, torch
from qdiff_kernels import use
for case in sys.argv[1:]:
    variant, dtype = case.split("/")
    weight, chosen = oracle.packed_weight(variant, 7, 208), oracle.make_extras("plain", 7, 208, 208)
    x = torch.randn(2, 208).to(getattr(torch, dtype))
    with use("cpu"):
        y = oracle.LINEAR[weight.kind](x, *weight.arguments, *chosen.values())
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 3e-2, case
"""


def test_kernels_that_different_processes_have_compiled_serve_one_process_together(tmp_path):
    """The second and the third process compile products that would have the same name if it did not tell their dtypes apart."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(oracle.__file__)}
    one, other = "int4-g64/bfloat16", "int4-g64/float32"
    for cases in (["int8-row/bfloat16", "int8-row/float32"], [one], [other], [other, one]):
        subprocess.run([sys.executable, "-c", MULTIPLY, *cases], check=True, env=environment)


def test_look_up_tables_give_the_products_and_count_their_operations():
    from qdiff_kernels.cpu import lookup_operations
    from qdiff_kernels.cpu.lookup import lookup_sums

    rows, vectors, books, size = 33, 11, 2, 8
    codes = torch.randint(0, 256, (rows, vectors * books), dtype=torch.uint8)
    codebooks, x = torch.randn(books, 256, size).half(), torch.randn(vectors, size)
    entries = codebooks.double()[torch.arange(books), codes.long().view(rows, vectors, books)].sum(2)
    expected = torch.einsum("rvd,vd->r", entries, x.double())
    assert oracle.relative_error(lookup_sums(codes.view(torch.int8), codebooks, x), expected) < 1e-5
    counts = lookup_operations(rows, vectors * size, books, 256, size, tokens=3)
    assert counts["dense_multiplications"] == 3 * rows * vectors * size
    assert counts["lookup_multiplications"] == 3 * (vectors * books * 256 * size + rows)
    assert counts["lookups"] == 3 * rows * vectors * books
    large = lookup_operations(12288, 3072, 4, 256, 16, tokens=1)
    assert large["multiplications_saved"] == pytest.approx(12288 / (4 * 256), rel=0.01)


def test_thresholds_are_measured_in_the_layout_of_the_stored_table():
    from qdiff_kernels.cpu import _thresholds, tune

    measured, stored = tune.measure_thresholds(size=64, repeats=1), _thresholds.table()
    assert measured.keys() == stored.keys()
    for table in ("few_tokens", "integer_tokens"):
        assert measured[table].keys() == stored[table].keys() == {"int8", "other"}
        assert measured[table]["other"].keys() == stored[table]["other"].keys()


PORTABLE = """
import oracle, torch
from qdiff_kernels import use
for variant in ("codebook-2x8-d8", "codebook-3x5-d3-int8", "e2m1-or-e1m2-g16", "int4-g64"):
    weight = oracle.packed_weight(variant, 7, 192)
    for extras in ("plain", "rotation+int8"):
        chosen = oracle.make_extras(extras, 7, 192, 192)
        for tokens in (1, 5, 100):
            x = torch.randn(tokens, 192).bfloat16()
            with use("cpu"):
                y = oracle.LINEAR[weight.kind](x, *weight.arguments, *chosen.values())
            assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 3e-2, (variant, extras, tokens)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 features")
def test_a_cpu_without_avx512_gets_the_same_results(tmp_path):
    machine = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2", "NUMBA_CACHE_DIR": str(tmp_path)}
    folder = os.path.dirname(oracle.__file__)
    subprocess.run([sys.executable, "-c", PORTABLE], check=True, env=os.environ | machine | {"PYTHONPATH": folder})


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_the_process_defaults_change_nothing(default, activations):
    """Work space of another dtype would be too short for what the kernels write, and a table of another would stay in its cache."""
    from qdiff_kernels.cpu import _weights

    codes = torch.randint(-128, 128, (24, 32), dtype=torch.int8)
    scales = torch.rand(24, 4).add(0.1).to(torch.float8_e4m3fn)
    x = torch.randn(300, 64)
    arguments = (x, codes, scales, torch.tensor([0.37]), "e2m1", 16, None, None, None, None, 0, activations)
    expected = minifloat_linear(*arguments)
    _weights._scale_table.cache_clear()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    try:
        found = minifloat_linear(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    assert torch.equal(minifloat_linear(*arguments), expected)


def test_a_branch_is_added_in_the_precision_of_the_output():
    """The product of quantized operands may be rounded to their dtype; what comes on top of it is not."""
    weight, chosen = weight_of("int4-g64", 64, 128), oracle.make_extras("low_rank+int4", 64, 128, 128)
    x = torch.randn(300, 128)
    without = run(weight, x, chosen | {"low_rank_down": None, "low_rank_up": None})
    added = x @ chosen["low_rank_down"].float().T @ chosen["low_rank_up"].float().T
    assert torch.allclose(run(weight, x, chosen) - without, added, atol=1e-4)
