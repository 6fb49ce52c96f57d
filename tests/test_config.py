"""Configs: what a user may ask for, what is refused, and the JSON that a checkpoint carries."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_diffusers import (
    AQConfig,
    CheckpointError,
    ConfigError,
    FPConfig,
    QDiffConfig,
    QDiffError,
    Quantization,
    RTNConfig,
    SVDQuantConfig,
    VQConfig,
)
from qdiff_diffusers.config import FORMAT_VERSION, METHODS
from qdiff_diffusers.formats import IntegerFormat, LayerSpec, MinifloatFormat
from qdiff_diffusers.formats.layer_table import StoredLayer

CLASSES = {"aq": AQConfig, "vq": VQConfig, "fp": FPConfig, "svdquant": SVDQuantConfig, "rtn": RTNConfig}
CONFIGS = {
    "aq": lambda: AQConfig(bits=2, effort=0, seed=3),
    "aq-explicit": lambda: AQConfig(num_codebooks=2, codebook_bits=8, vector_size=8, codebook="layer", group_size=64),
    "vq": lambda: VQConfig(codebook_bits=6, vector_size=2, row_scales=False, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4", activations="fp8", rotation=True),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=16, rounds=1, activations="int4", keep_outer_layers=False),
    "rtn": lambda: RTNConfig(bits=8, group_size="row", modules_to_not_convert=["norm"]),
    "overrides": lambda: RTNConfig(bits=4, overrides={"attn": FPConfig(bits=8), "norm": None, "ff": {"method": "vq", "bits": 2}}),
}


def described_model() -> Quantization:
    """A record as it is after quantizing a model."""
    layers = {
        "a": StoredLayer(LayerSpec(IntegerFormat(4)), (64, 32), 0.005),
        "b": StoredLayer(LayerSpec(IntegerFormat(4)), (8, 64), 0.25),
        "c": StoredLayer(LayerSpec(MinifloatFormat(("e2m1",)), rank=4, rotation=16, activations="int8"), (64, 32, 3, 3), None),
    }
    config = RTNConfig(bits=4, compute_dtype="bfloat16")
    return Quantization(config, layers, {"d": "outside the repeated blocks"}, {"model_class": "DiTTransformer2DModel"})


@pytest.mark.parametrize("method", CLASSES)
def test_a_method_may_be_chosen_by_name(method):
    config = QDiffConfig(method=method)
    assert type(config) is CLASSES[method] is METHODS[method]
    assert config == CLASSES[method]()
    assert config.method == config.method_name == method
    assert config.quant_method.value == "qdiff"


def test_settings_of_a_method_may_be_given_by_name():
    assert QDiffConfig(method="svdquant", bits=4, rank=8) == SVDQuantConfig(bits=4, rank=8)
    assert QDiffConfig("aq", bits=2) == AQConfig(bits=2)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: QDiffConfig(), "None"),
        (lambda: QDiffConfig(method="gptq"), "gptq"),
        (lambda: QDiffConfig(method=["aq"]), "aq"),
        (lambda: AQConfig(method="vq"), "vq"),
        (lambda: AQConfig(bits=5), "5"),
        (lambda: VQConfig(bits=1.5), "1.5"),
        (lambda: FPConfig(bits=16), "16"),
        (lambda: RTNConfig(bits=9), "9"),
        (lambda: SVDQuantConfig(bits="4"), "'4'"),
        (lambda: AQConfig(activations="int4"), "int4"),
        (lambda: FPConfig(activations="int16"), "int16"),
        (lambda: RTNConfig(activations=8), "8"),
        (lambda: AQConfig(compute_dtype="float12"), "float12"),
        (lambda: AQConfig(compute_dtype=16), "16"),
        (lambda: AQConfig(compute_dtype="int8"), "int8"),
        (lambda: AQConfig(compute_dtype="complex64"), "complex64"),
        (lambda: AQConfig(rotation="yes"), "yes"),
        (lambda: AQConfig(rotation=128), "128"),
        (lambda: AQConfig(keep_outer_layers="no"), "no"),
        (lambda: AQConfig(seed="7"), "'7'"),
        (lambda: AQConfig(modules_to_not_convert=7), "7"),
        (lambda: AQConfig(modules_to_not_convert=["norm", 7]), "7"),
        (lambda: AQConfig(overrides=["attn"]), "attn"),
        (lambda: AQConfig(overrides={"attn": "fp8"}), "fp8"),
        (lambda: AQConfig(overrides={"attn": {"bits": 4}}), "attn"),
        (lambda: AQConfig(overrides={"attn": {"method": "rtn", "bits": 40}}), "40"),
        (lambda: AQConfig(overrides={"attn": {"method": "rtn", "colour": 1}}), "colour"),
        (lambda: AQConfig(overrides={"attn": RTNConfig(overrides={"to_q": None})}), "attn"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_any_work(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_a_config_error_is_a_value_error():
    assert issubclass(ConfigError, QDiffError)
    assert issubclass(CheckpointError, QDiffError)
    assert issubclass(QDiffError, ValueError)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(name):
    config = CONFIGS[name]()
    assert QDiffConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_can_be_copied_and_pickled(name):
    config = CONFIGS[name]()
    assert copy.deepcopy(config) == copy.copy(config) == pickle.loads(pickle.dumps(config)) == config


@given(
    st.sampled_from(sorted(CLASSES)),
    st.one_of(st.none(), st.booleans()),
    st.sampled_from([None, "int8", "fp8"]),
    st.one_of(st.none(), st.lists(st.text(min_size=1), max_size=3)),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_any_valid_config_survives_json(method, rotation, activations, patterns, seed, keep):
    config = QDiffConfig(
        method=method,
        rotation=rotation,
        activations=activations,
        modules_to_not_convert=patterns,
        seed=seed,
        keep_outer_layers=keep,
    )
    assert QDiffConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_description_of_a_quantized_model_survives_json():
    record = described_model()
    restored = Quantization.from_dict(json.loads(json.dumps(record.to_dict())))
    assert restored == record
    assert restored.config == record.config
    assert restored.layers == record.layers
    assert restored.skipped == record.skipped
    assert restored.provenance == record.provenance
    assert restored.to_dict() == record.to_dict()


def test_a_description_reads_as_the_config_that_was_asked_for():
    record = described_model()
    assert (record.bits, record.method_name, record.settings()) == (4, "rtn", record.config.settings())
    assert QDiffConfig.from_dict(record.to_dict()) == record.config
    with pytest.raises(AttributeError, match="colour"):
        _ = record.colour


def test_a_description_can_be_copied_and_pickled():
    record = described_model()
    assert copy.deepcopy(record) == copy.copy(record) == pickle.loads(pickle.dumps(record)) == record


def test_a_copy_of_a_description_is_its_own():
    record = described_model()
    for copied in (copy.copy(record), copy.deepcopy(record), Quantization.of(record)):
        copied.layers.pop("a")
        copied.skipped.clear()
        copied.compute_dtype = "float16"
    assert record == described_model()


@pytest.mark.parametrize("made", [CONFIGS[name] for name in CONFIGS], ids=list(CONFIGS))
def test_a_config_does_not_change_once_it_is_made(made):
    config = made()
    for changed in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(ConfigError, match=r"dataclasses.replace\(config, bits=\.\.\.\)"):
            changed.bits = 8
    assert config == made()
    assert dataclasses.replace(config, seed=5).seed == 5


def test_how_a_model_was_quantized_cannot_be_chosen_afterwards():
    with pytest.raises(ConfigError, match="how the model was quantized; bits"):
        described_model().bits = 2


def test_a_list_of_patterns_is_the_configs_own():
    patterns = ["norm"]
    config = RTNConfig(modules_to_not_convert=patterns)
    patterns.append("attn")
    assert config.modules_to_not_convert == ["norm"]


def test_equal_specs_are_stored_once():
    stored = described_model().to_dict()
    assert len(stored["specs"]) == 2
    assert [entry[0] for entry in stored["layers"].values()] == [0, 0, 1]


def test_only_settings_that_differ_from_the_defaults_are_stored():
    assert RTNConfig(bits=4).to_dict() == {"quant_method": "qdiff", "format_version": FORMAT_VERSION, "method": "rtn", "bits": 4}


def test_the_settings_of_one_model_leave_nothing_of_it_in_the_next():
    record = described_model()
    asked_again = record.requested()
    assert asked_again.config == record.config
    assert not asked_again.layers
    assert not asked_again.skipped
    assert not asked_again.provenance


def test_dtypes_may_be_given_as_torch_dtypes():
    assert RTNConfig(compute_dtype=torch.bfloat16).compute_dtype == "bfloat16"


def test_no_activation_quantization_has_two_spellings():
    assert RTNConfig(activations="none") == RTNConfig(activations=None)


def test_one_pattern_may_be_given_without_a_list():
    assert RTNConfig(modules_to_not_convert="norm").modules_to_not_convert == ["norm"]


def test_repr_and_iteration_show_the_settings():
    config = CONFIGS["overrides"]()
    assert "overrides" in repr(config)
    assert dict(config) == config.to_dict()


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("blocks.0.attn.to_q", "fp"),
        ("blocks.0.attn.to_out", None),
        ("blocks.0.attn.norm", None),
        ("blocks.0.ff.attn", "fp"),
        ("blocks.0.ff.net", "rtn"),
        ("blocks.0.other", "aq"),
    ],
)
def test_exclusions_come_first_then_the_first_matching_override_then_the_config(module, method):
    overrides = {"to_out": None, "attn": FPConfig(bits=8), "ff": RTNConfig(bits=8)}
    config = AQConfig(bits=2, modules_to_not_convert=["norm"], overrides=overrides)
    chosen = config.config_for(module)
    assert (chosen and chosen.method) == method


STORED = described_model().to_dict()


def changed(**changes) -> dict:
    return json.loads(json.dumps(STORED)) | changes


def with_layer(entry) -> dict:
    return changed(layers={"a": entry})


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "None"),
        (changed(format_version=2), "version 2"),
        (changed(format_version="1"), "'1'"),
        (changed(format_version=None), "None"),
        (changed(method="gptq"), "gptq"),
        (changed(method=None), "None"),
        (changed(method=["aq"]), "aq"),
        (changed(colour="red"), "colour"),
        (changed(bits=17), "17"),
        (changed(specs=None), "specs"),
        (changed(layers=[1, 2]), "layers"),
        (changed(specs={"format": {}}), "specs"),
        (changed(specs=[{"format": {"kind": "ternary"}}]), "ternary"),
        (changed(specs=[{"format": {"kind": "integer", "bits": 4, "colour": 1}}]), "colour"),
        (changed(specs=["int4"]), "spec 0"),
        (with_layer([5, [64, 32], 0.1]), "layer a"),
        (with_layer([-1, [64, 32], 0.1]), "layer a"),
        (with_layer([True, [64, 32], 0.1]), "layer a"),
        (with_layer([0, [64], 0.1]), "layer a"),
        (with_layer([0, [64, -32], 0.1]), "layer a"),
        (with_layer([0, [64, 32.5], 0.1]), "layer a"),
        (with_layer([0, ["64", 32], 0.1]), "layer a"),
        (with_layer([0, 64, 0.1]), "layer a"),
        (with_layer([0, [64, 32]]), "layer a"),
        (with_layer([0, [64, 32], "small"]), "layer a"),
        (with_layer([0, [64, 32], [0.1]]), "layer a"),
        (with_layer(None), "layer a"),
        (with_layer([1, [64, 24, 3, 3], 0.1]), "layer a.*rotation 16 does not divide"),
        (changed(skipped=["d"]), "skipped"),
        (changed(provenance="me"), "provenance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_description_is_refused_by_name(data, named):
    with pytest.raises(QDiffError, match=named):
        Quantization.from_dict(data)


def test_huge_sizes_are_read_without_allocating():
    config = Quantization.from_dict(with_layer([0, [1 << 40, 1 << 40], 0.1]))
    assert config.layers["a"].spec.nbytes((1 << 40, 1 << 40)) > 1 << 78
