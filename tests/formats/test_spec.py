"""``LayerSpec``: strict JSON, exact sizes, and the dense weight a layer is equivalent to."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_diffusers.formats import (
    CodebookFormat,
    IntegerFormat,
    LayerSpec,
    MinifloatFormat,
    matrix_shape,
    rotate_matrix,
    unrotate_matrix,
)

GROUPS = st.sampled_from(["row", "tensor", 8, 64, 128])
FORMATS = st.one_of(
    st.builds(IntegerFormat, st.integers(2, 8), GROUPS, st.booleans(), st.sampled_from(["float16", "float32", "e4m3"])),
    st.builds(
        MinifloatFormat,
        st.sampled_from([("e2m1",), ("e4m3",), ("e2m1", "e1m2")]),
        GROUPS,
        st.sampled_from(["float16", "float32", "e4m3"]),
        st.booleans(),
    ),
    st.builds(
        CodebookFormat,
        st.integers(1, 8),
        st.integers(1, 16),
        st.sampled_from([1, 2, 4, 8]),
        st.none(),
        GROUPS,
        st.sampled_from(["float16", "int8"]),
        st.sampled_from(["float16", "bfloat16", "float32"]),
    ),
)
SPECS = st.builds(
    LayerSpec,
    FORMATS,
    st.integers(0, 64),
    st.sampled_from([0, 1, 2, 16, 256]),
    st.booleans(),
    st.sampled_from(["none", "int8", "fp8", "int4"]),
)


@given(SPECS)
def test_a_spec_survives_json(spec):
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(SPECS, st.sampled_from([(3, 256), (512, 512), (16, 256, 3, 3), (1, 256, 1, 1)]))
def test_bits_per_weight_is_the_stored_size_over_the_number_of_weights(spec, shape):
    stored = sum(info.nbytes for info in spec.tensors(shape).values())
    assert spec.nbytes(shape) == stored
    assert spec.bits_per_weight(shape) * torch.Size(shape).numel() == pytest.approx(8 * stored)


GOOD = {"format": {"kind": "integer", "bits": 4}}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (None, "None"),
        ([], r"\[\]"),
        ({}, "format"),
        ({"format": "int4"}, "int4"),
        ({"format": {}}, "None"),
        ({"format": {"kind": "ternary"}}, "ternary"),
        ({"format": {"kind": "integer"}}, "bits"),
        ({"format": {"kind": "integer", "bits": 4, "colour": 1}}, "colour"),
        ({"format": {"kind": "integer", "bits": 12}}, "12"),
        ({"format": {"kind": "integer", "bits": "4"}}, "'4'"),
        ({"format": {"kind": "integer", "bits": 4, "group_size": 1.5}}, "1.5"),
        ({"format": {"kind": "integer", "bits": 4, "group_size": None}}, "None"),
        ({"format": {"kind": "integer", "bits": 4, "symmetric": "false"}}, "false"),
        ({"format": {"kind": "minifloat", "encodings": "e2m1"}}, "e2m1"),
        ({"format": {"kind": "minifloat", "encodings": ["e7m7"]}}, "e7m7"),
        ({"format": {"kind": "minifloat", "encodings": [3]}}, "3"),
        ({"format": {"kind": "minifloat", "encodings": ["e2m1"], "scale_dtype": "float64"}}, "float64"),
        ({"format": {"kind": "minifloat", "encodings": ["e2m1"], "tensor_scale": 1}}, "tensor_scale"),
        ({"format": {"kind": "codebook", "num_codebooks": 1, "codebook_bits": 40, "vector_size": 4}}, "40"),
        ({"format": {"kind": "codebook", "num_codebooks": 1, "codebook_bits": 8, "vector_size": 1 << 40}}, "1099511627776"),
        ({"format": {"kind": "codebook", "num_codebooks": 1, "codebook_bits": 8, "vector_size": 4, "table": "moon"}}, "moon"),
        (GOOD | {"colour": 1}, "colour"),
        (GOOD | {"rank": -1}, "-1"),
        (GOOD | {"rank": 1 << 40}, "1099511627776"),
        (GOOD | {"rank": 2.5}, "2.5"),
        (GOOD | {"rotation": 24}, "24"),
        (GOOD | {"rotation": 1 << 20}, "1048576"),
        (GOOD | {"smooth": "false"}, "false"),
        (GOOD | {"activations": "int5"}, "int5"),
    ],
    ids=str,
)
def test_a_malformed_spec_is_refused_by_name(data, named):
    with pytest.raises(ValueError, match=named):
        LayerSpec.from_dict(data)


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 4), (4, 4, 4, 4, 4), (0, 4), (4, -1), (4, 4, 0, 1)], ids=str)
def test_only_matrices_and_convolution_kernels_have_a_stored_form(shape):
    with pytest.raises(ValueError, match="must have shape"):
        matrix_shape(shape)


def test_a_rotation_must_divide_the_input_channels():
    spec = LayerSpec(IntegerFormat(4), rotation=32)
    spec.tensors((8, 64))
    spec.tensors((8, 64, 3, 3))
    with pytest.raises(ValueError, match="rotation 32 does not divide the 48 input channels"):
        spec.tensors((8, 48))


@pytest.mark.parametrize("shape", [(6, 32), (6, 32, 1, 1), (6, 32, 3, 3), (6, 32, 2, 5)], ids=str)
def test_rotating_a_weight_turns_each_tap_of_a_kernel_by_itself(shape):
    rows, columns = matrix_shape(shape)
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    turned = rotate_matrix(matrix, 32, 16)
    taps = columns // 32
    alone = torch.cat([rotate_matrix(matrix[:, t * 32 : (t + 1) * 32], 32, 16) for t in range(taps)], 1)
    assert torch.equal(turned, alone)
    assert torch.allclose(unrotate_matrix(turned, 32, 16), matrix, atol=1e-12)
    assert torch.equal(rotate_matrix(matrix, 32, 0), matrix)


@pytest.mark.parametrize("shape", [(6, 32), (6, 32, 3, 2)], ids=["linear", "conv2d"])
def test_the_equivalent_dense_weight_undoes_rotation_and_smoothing_and_adds_the_branch(shape):
    """Dense = (unrotated code weight) / smooth + up @ down, in the logical layout, against matrices written out."""
    rows, columns = matrix_shape(shape)
    spec = LayerSpec(IntegerFormat(8, "row"), rank=2, rotation=16, smooth=True)
    codes = torch.randint(-128, 128, (rows, columns))
    tensors = spec.format.pack(codes, torch.rand(rows, 1))
    tensors |= {
        "low_rank_down": torch.randn(2, columns).half(),
        "low_rank_up": torch.randn(rows, 2).half(),
        "smooth": (torch.rand(32) + 0.5).half(),
    }
    matrix = codes * tensors["scales"].double()
    turn = rotate_matrix(torch.eye(32, dtype=torch.float64), 32, 16)  # x @ turn = rotated x
    taps = [m @ turn.T / tensors["smooth"].double() for m in matrix.split(32, 1)]
    matrix = torch.cat(taps, 1) + tensors["low_rank_up"].double() @ tensors["low_rank_down"].double()
    expected = matrix if len(shape) == 2 else matrix.view(rows, *shape[2:], 32).permute(0, 3, 1, 2)
    dense = spec.dequantize(tensors, shape, torch.float64)
    assert dense.shape == shape
    assert torch.allclose(dense, expected, atol=1e-9)


def test_describe_says_what_is_stored():
    spec = LayerSpec(IntegerFormat(4, 64, symmetric=False), rank=32, rotation=128, smooth=True, activations="int4")
    assert spec.describe() == "int4 asymmetric g64, rank 32, rotated 128, smoothed, int4 activations"
    assert LayerSpec(MinifloatFormat(("e2m1",), "row")).describe() == "e2m1 per row float16 scales"
