"""Settings: whatever a config accepts can be done, and what cannot is refused before any weight is read."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qdiff_diffusers import AQConfig, ConfigError, FPConfig, QDiffConfig, Quantization, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.config import METHODS
from qdiff_diffusers.methods import quantize_weight
from qdiff_diffusers.model.selection import check_layers, select_layers

EVEN, ODD, KERNEL = (64, 96), (37, 53), (12, 32, 3, 3)
WRONG = [
    math.nan,
    math.inf,
    -math.inf,
    -3,
    -0.5,
    10**30,
    2.5,
    "32",
    "yes",
    "",
    b"x",
    [],
    ["a", 7],
    {"a": 1},
    (),
    object(),
    True,
    False,
]
OF_ALL = {
    "bits": [True, math.nan, "4", 17, 0, -1, [4]],
    "rotation": [1, "yes", 128],
    "activations": [8, "int16", ["int8"], True],
    "activation_scales": ["row", None, 1],
    "unsigned": ["no", 1, None],
    "modules_to_not_convert": [7, ["norm", 7], {"norm": 1}, [""], ""],
    "overrides": [["attn"], {"attn": 8}, {7: None}, {"": None}, "attn"],
    "by_kind": ["x", 1, None],
    "unbiased": ["no", 0, None],
    "keep_outer_layers": ["no", 1, None],
    "outer_bits": [9, "8", True, 2.5],
    "target": ["forge", 7, True, ["comfyui:int8"], "comfyui:fp8"],
    "compute_dtype": ["float12", 16, "int8", True],
    "seed": ["7", 1.5, True, 2**70, None, math.nan],
    "method": ["gptq", 3],
}
OF_METHODS = {
    "aq": {
        "num_codebooks": [99, 0, -1, 2.0, "2", True],
        "codebook_bits": [17, 0, "8", True],
        "vector_size": [65, 0, 8.0, "8"],
        "codebook": ["nope", 1, True],
        "group_size": [0, -1, 10**9, "col", 64.0, True, 7],
        "effort": [7, -1, "1", 1.0, True, None],
        "kernel_vectors": ["yes", 1, None],
    },
    "vq": {
        "codebook_bits": [17, 0, "8", True],
        "vector_size": [65, 0, 8.0, "8"],
        "codebook": ["nope", 1],
        "row_scales": ["yes", 1, None],
        "restarts": [-3, 0, 10**6, "2", True, None],
    },
    "fp": {
        "weight_format": ["bogus", "", "e9m9", "e2m1,e3m2", "e2m1,e1m2,e1m2uz", 4, True],
        "group_size": [0, -1, 10**9, "col", 16.0, True],
        "scale_dtype": ["fp99", 16, True],
        "scale_search": ["slow", None, 1],
        "tensor_scale": ["two", -1.0, 0, math.inf, True],
    },
    "svdquant": {
        "weight_format": ["bogus", "", "int9", "int1", "intx", "exmy", 4],
        "group_size": [0, -1, 10**9, "col", 16.0],
        "rank": [-3, "32", 2.5, 10**6, True, math.inf],
        "branch_bits": [-1, 17, math.nan, math.inf, "1", True],
        "rounds": [0, -1, "3", 1.5, True, None],
        "smoothing": ["yes", 1, None],
        "adaln_w4a16": ["yes", 1, None],
    },
    "rtn": {"group_size": [0, -1, 10**9, "col", 16.0, True, None]},
}
BAD = [
    pytest.param(method, name, value, id=f"{method}-{name}-{value!r}")
    for method, own in OF_METHODS.items()
    for name, values in (OF_ALL | own).items()
    for value in values
]


@pytest.mark.parametrize(("method", "name", "value"), BAD)
def test_a_wrong_value_is_refused_when_the_config_is_made(method, name, value):
    with pytest.raises(ConfigError) as caught:
        METHODS[method](**{name: value})
    assert name in str(caught.value)
    inner = [*value.items(), *sum(value.items(), ())] if isinstance(value, dict) else value if isinstance(value, list) else []
    assert any(repr(wrong) in str(caught.value) for wrong in (value, *inner))


def test_the_wrong_values_cover_every_field():
    for method, kind in METHODS.items():
        assert {f.name for f in fields(kind)} == set(OF_ALL) | set(OF_METHODS[method])


CONTRADICTIONS = {
    "bits=8": lambda: FPConfig(bits=8, weight_format="nvfp4"),
    "bits=3": lambda: FPConfig(bits=3, weight_format="e2m1"),
    "bits=4": lambda: SVDQuantConfig(bits=4, weight_format="int8"),
    "nvfp4 has groups of 16": lambda: FPConfig(weight_format="nvfp4", group_size=32),
    "nvfp4 has groups": lambda: SVDQuantConfig(weight_format="nvfp4", group_size="row"),
    "e8m0": lambda: FPConfig(weight_format="e2m1uz", scale_dtype="e8m0"),
    "e8m0 scales have no sign": lambda: FPConfig(weight_format="e2m1,e1m2", scale_dtype="e8m0"),
    "branch_bits goes without rank": lambda: SVDQuantConfig(branch_bits=1, rank=4),
    "group_size goes with scalar": lambda: SVDQuantConfig(weight_format="vq", group_size=64),
    "got 8": lambda: SVDQuantConfig(weight_format="aq", bits=8),
    "multiple of vector_size": lambda: AQConfig(group_size=12, vector_size=8),
    "no shared codebook": lambda: VQConfig(codebook="shared", vector_size=7),
    "other settings fix them": lambda: FPConfig(bits=4, weight_format="nvfp4", by_kind=True),
    "other settings fix": lambda: AQConfig(bits=2, num_codebooks=1, codebook_bits=8, vector_size=4, by_kind=True),
    "other settings": lambda: SVDQuantConfig(bits=4, weight_format="int4", by_kind=True),
    'activation_scales="static"': lambda: RTNConfig(activation_scales="static"),
    "unsigned goes without rotation": lambda: SVDQuantConfig(activations="int4", unsigned=True, rotation=True),
    "has modules_to_not_convert of its own": lambda: RTNConfig(overrides={"ff": RTNConfig(modules_to_not_convert=["net"])}),
    "has outer_bits of its own": lambda: AQConfig(overrides={"ff": FPConfig(outer_bits=8)}),
    "give bits too": lambda: RTNConfig(by_kind=True),
    "make the config": lambda: RTNConfig(target="comfyui:int8"),
    "that target_config makes": lambda: FPConfig(weight_format="nvfp4", target="comfyui:mxfp8"),
}


@pytest.mark.parametrize("named", CONTRADICTIONS)
def test_settings_that_contradict_one_another_are_refused(named):
    with pytest.raises(ConfigError, match=named):
        CONTRADICTIONS[named]()


@pytest.mark.parametrize(
    "config", [FPConfig(bits=4, weight_format="nvfp4"), SVDQuantConfig(bits=4, weight_format="int4")], ids=repr
)
def test_mixed_bits_are_refused_where_other_settings_fix_them(config):
    with pytest.raises(ConfigError, match="mixed precision needs bits"):
        config.alternatives()


def test_the_ranks_that_mixed_precision_may_choose_are_all_allowed():
    config = SVDQuantConfig(branch_bits=6)
    for other in config.alternatives():
        SVDQuantConfig(**other)
    assert {"branch_bits": 6.0} in config.alternatives()


def test_whole_numbers_of_other_libraries_become_pythons_own():
    numpy = pytest.importorskip("numpy")
    config = SVDQuantConfig(bits=numpy.int64(4), rank=numpy.int32(8), seed=numpy.uint8(3))
    assert (config.rank, config.seed) == (8, 3) and type(config.rank) is type(config.seed) is int
    assert config == QDiffConfig.from_dict(config.to_dict())


ANY = (
    st.sampled_from(WRONG)
    | st.integers(-4, 80)
    | st.sampled_from(["row", "tensor", "shared", "layer", "nvfp4", "e2m1", "int8", "aq"])
)


@given(st.sampled_from(sorted(OF_METHODS)), st.data())
@settings(max_examples=150)
def test_what_a_config_accepts_can_be_done(method, data):
    """Whatever the fields hold: a ConfigError when it is made or when the shape is known, or a packed weight."""
    names = sorted(OF_METHODS[method])
    given_ = {name: data.draw(ANY, label=name) for name in data.draw(st.sets(st.sampled_from(names), max_size=3))}
    quick = {"aq": {"effort": 0}, "vq": {"restarts": 1}, "svdquant": {"rounds": 1}}.get(method, {})
    try:
        config = METHODS[method](**(quick | given_))
        shape = data.draw(st.sampled_from([EVEN, ODD]))
        check_layers({"layer": config}, {"layer": shape})
    except ConfigError:
        return
    spec, tensors, _ = quantize_weight(torch.randn(shape), config)
    assert spec.dequantize(tensors, shape).isfinite().all()


def case(config, *shapes):
    return [pytest.param(config, shape, id=f"{config.method_name}-{describe(config)}-{shape}") for shape in shapes or (EVEN, ODD)]


def describe(config):
    return ",".join(f"{key}={value}" for key, value in config.settings().items() if key != "method") or "default"


def documented():
    """Each combination that README, docs/fp_and_svdquant.md and the docstrings name, and their products."""
    out = []
    for kind, (inputs, rotation) in itertools.product(METHODS.values(), [(None, None), (None, True), (None, False)]):
        for bits in kind.bit_choices:
            quick = {"aq": {"effort": 0}, "vq": {"restarts": 1}, "svdquant": {"rounds": 1}}.get(kind.method_name, {})
            out += case(kind(bits=bits, activations=inputs, rotation=rotation, **quick))
    for kind in METHODS.values():
        for inputs, rotation in itertools.product(kind.activation_choices, (None, True)):
            out += case(kind(activations=inputs, rotation=rotation), EVEN, ODD, KERNEL)
    encodings = ["e1m2", "e2m1", "e3m0", "e2m1uz", "e1m2uz,e2m1uz", "e2m2", "e3m2", "e2m3", "e4m3", "e5m2", "e3m4", "exmy"]
    for encoding, group in itertools.product(encodings, (None, 8, 32, 64, 128, "row", "tensor")):
        out += case(FPConfig(weight_format=encoding, group_size=group))
    for group, scales in itertools.product((16, 64, "row", "tensor"), ("float16", "bfloat16", "float32", "e4m3", "e8m0")):
        out += case(FPConfig(bits=4, group_size=group, scale_dtype=scales))
    for bits, search in itertools.product((3, 4, 6, 8), ("fast", "grid", "absmax")):
        out += case(FPConfig(bits=bits, weight_format="exmy", group_size="tensor", scale_search=search))
        out += case(FPConfig(bits=bits, group_size=32, scale_search=search, scale_dtype="e8m0"))
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        out += case(FPConfig(weight_format=name)) + case(SVDQuantConfig(weight_format=name, rank=4, rounds=1))
    residuals = [f"int{bits}" for bits in range(2, 9)] + ["e2m1", "e1m2uz,e2m1uz", "e4m3"]
    for residual, group in itertools.product(residuals, (None, 32, "row", "tensor")):
        out += case(SVDQuantConfig(weight_format=residual, group_size=group, rank=4, rounds=1))
    for inputs, residual in itertools.product(SVDQuantConfig.activation_choices, ("int4", "int8", "nvfp4")):
        out += case(SVDQuantConfig(weight_format=residual, rank=4, rounds=1, activations=inputs), EVEN, ODD, KERNEL)
    for method in ("aq", "vq"):
        out += case(SVDQuantConfig(bits=2, weight_format=method, rank=4, rounds=1))
    out += (
        case(SVDQuantConfig(weight_format="int4", branch_bits=0.33))
        + case(SVDQuantConfig(rank=0))
        + case(SVDQuantConfig(rank=4096))
    )
    for bits, group in itertools.product((1, 4, 8), (1, 7, 64, 1024, "row", "tensor")):
        out += case(RTNConfig(bits=bits, group_size=group))
    for bits, codebook in itertools.product((2, 3, 4), ("shared", "layer")):
        out += case(VQConfig(bits=bits, codebook=codebook, row_scales=False, restarts=1)) + case(
            AQConfig(bits=bits, codebook=codebook, effort=0)
        )
    for size, group in itertools.product((4, 8, 9), ("row", "tensor", 72)):
        out += case(AQConfig(num_codebooks=2, codebook_bits=4, vector_size=size, group_size=group, effort=0), EVEN, ODD)
    return out + case(AQConfig(num_codebooks=1, codebook_bits=4, vector_size=9, kernel_vectors=True, effort=0), KERNEL)


@pytest.mark.parametrize(("config", "shape"), documented())
def test_every_documented_combination_works(config, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spec, tensors, error = quantize_weight(weight, config)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: i.shape for n, i in spec.tensors(shape).items()}
    assert spec.activations == (config.activations or "none")
    assert error >= 0 and (error < 1 or config.bits == 1)  # one bit between minimum and maximum is worse than nothing
    assert QDiffConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "config", [SVDQuantConfig(weight_format="int8", rank=4), SVDQuantConfig(weight_format="int8", group_size=16)]
)
def test_int8_residuals_are_as_good_as_eight_bits_are(config):
    assert quantize_weight(torch.randn(EVEN), config).error < 1e-4


class Model(nn.Module):
    """Layers inside and outside of a list of blocks, none of them in memory."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.blocks = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)


ABSURD = {
    "bits per weight": (VQConfig(codebook_bits=16, vector_size=8), (32, 32)),
    "more than the 16": (AQConfig(num_codebooks=2, codebook_bits=12, vector_size=8, codebook="layer"), (32, 32)),
    "minutes of a CPU core": (VQConfig(codebook_bits=16, vector_size=8), (3072, 3072)),
    "minutes of": (VQConfig(codebook_bits=14, vector_size=4, restarts=100), (3072, 3072)),
    "of a CPU core for this layer": (AQConfig(num_codebooks=8, codebook_bits=14, vector_size=32, effort=3), (12288, 3072)),
    "longer than a row of 64": (RTNConfig(group_size=4096), (3072, 64)),
    "group_size 2048": (FPConfig(group_size=2048), (3072, 64)),
    "group_size 8192": (AQConfig(group_size=8192), (64, 3072)),
    "rank 6144": (SVDQuantConfig(branch_bits=16), (12288, 12288)),
}


@pytest.mark.parametrize("named", ABSURD)
def test_what_a_shape_rules_out_is_said_before_any_weight_is_read(named):
    config, shape = ABSURD[named]
    with pytest.raises(ConfigError, match=named) as caught:
        select_layers(Model(shape), config, [])
    assert f"layer blocks.0 {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_every_preset_suits_layers_of_every_size(kind):
    for bits, shape in itertools.product(kind.bit_choices, [(32, 32), (3072, 64), (3072, 3072), (18432, 3072), (256000, 4096)]):
        slow = {"effort": 3} if kind is AQConfig else {}
        targets, _ = select_layers(Model(shape), kind(bits=bits, **slow), [])
        assert list(targets) == ["blocks.0"]


def test_a_layer_that_grows_is_told(caplog):
    select_layers(Model((32, 32)), SVDQuantConfig(weight_format="int4", rank=32), [])
    assert "take more than the 16 bits per weight" in caplog.text and "blocks.0 [32, 32]" in caplog.text


@pytest.mark.parametrize(
    "settings_",
    [
        {"method": "svdquant", "rank": -3},
        {"method": "svdquant", "rounds": 0},
        {"method": "fp", "bits": 8, "weight_format": "nvfp4"},
        {"method": "aq", "unbiased": "no", "kernel_vectors": "yes"},
        {"method": "rtn", "bits": True, "by_kind": "x"},
        {"method": "rtn", "modules_to_not_convert": [""]},
        {"method": "rtn", "overrides": {"a": {"method": "svdquant", "rank": -1}}},
    ],
    ids=str,
)
def test_models_that_earlier_releases_made_with_such_settings_still_load(settings_):
    stored = {"quant_method": "qdiff", "format_version": 1, "provenance": {"package": "qdiff-diffusers 0.1.0"}} | settings_
    config = Quantization.from_dict(stored)
    assert config.to_dict() == stored
    with pytest.raises(ConfigError):
        QDiffConfig(**settings_)
