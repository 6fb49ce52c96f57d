"""Bits spread over the kinds of layers: the mean stays, and the layers that matter least pay."""

from __future__ import annotations

import pytest
import tiny_models

from qdiff_diffusers import AQConfig, ConfigError, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.model.bit_allocation import SENSITIVITY, kind_of, spread_by_kind
from qdiff_diffusers.model.selection import select_layers

BLOCK = "transformer_blocks.3."
NAMES = {
    "norm1.linear": "modulation",
    "norm1.emb.timestep_embedder.linear_1": "modulation",
    "norm1_context.linear": "modulation",
    "img_mod.1": "modulation",
    "attn1.to_q": "query_key",
    "attn.add_k_proj": "query_key",
    "self_attn.q_proj": "query_key",
    "attn.add_v_proj": "value_out",
    "attn1.to_out.0": "value_out",
    "attn.to_qkv": "value_out",
    "ff.net.0.proj": "feed_forward",
    "ff_context.net.2": "feed_forward",
    "img_mlp.net.2": "feed_forward",
    "resnets.0.conv1": "convolution",
    "resnets.1.time_emb_proj": "modulation",
    "downsamplers.0.conv": "convolution",
    "resnets.1.conv_shortcut": "shortcut",
    "proj_in": "other",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kinds_follow_from_names(name: str, kind: str):
    assert kind_of(BLOCK + name) == kind in SENSITIVITY


def block(width: int = 256) -> dict[str, tuple[int, ...]]:
    """Weights of a transformer block."""
    shapes = {f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= {"norm1.linear": (6 * width, width), "ff.net.0.proj": (4 * width, width), "ff.net.2": (width, 4 * width)}
    return {BLOCK + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize("cls", [AQConfig, VQConfig, FPConfig, SVDQuantConfig, RTNConfig])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mean_stays_and_modulation_pays(cls: type[QDiffConfig], bits: int):
    if bits not in cls.bit_choices:
        pytest.skip("no such width")
    shapes = block()
    chosen = spread_by_kind({name: cls(bits=bits, by_kind=True) for name in shapes}, shapes)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    given = {name.removeprefix(BLOCK): config.bits for name, config in chosen.items()}
    mean = sum(chosen[name].bits * sizes[name] for name in shapes) / sum(sizes.values())
    slack = max(sizes.values()) / sum(sizes.values())  # nothing can be split between layers
    assert bits - slack <= mean <= bits + 0.1
    assert given["norm1.linear"] <= given["attn.to_q"] <= given["attn.to_v"] <= max(given.values())
    assert given["ff.net.2"] >= bits
    assert min(given.values()) > bits / 2
    widths = cls(bits=bits).widths
    nothing_to_trade = bits in (min(widths), max(widths))
    assert given["norm1.linear"] < bits or nothing_to_trade


def test_the_narrow_levels_of_a_unet_get_more():
    shapes = {f"level{n}.resnets.0.conv1": (width, width, 3, 3) for n, width in enumerate((32, 64, 128))}
    chosen = spread_by_kind({name: SVDQuantConfig(bits=3, by_kind=True) for name in shapes}, shapes)
    bits = [chosen[name].bits for name in shapes]
    assert bits[0] > bits[-1] and bits == sorted(bits, reverse=True)


def test_other_layers_are_left_alone():
    shapes = block()
    targets = {name: RTNConfig(bits=4) for name in shapes}
    assert spread_by_kind(targets, shapes) == targets


def test_a_model_gets_more_than_one_width_and_overrides_keep_theirs():
    model = tiny_models.make("dit")
    targets, _ = select_layers(model, AQConfig(bits=2, by_kind=True, overrides={"to_k": {"method": "rtn", "bits": 8}}), [])
    assert {c.bits for name, c in targets.items() if "to_k" in name} == {8}
    assert len({c.bits for name, c in targets.items() if "to_k" not in name}) > 1


def test_there_must_be_bits_to_spread():
    with pytest.raises(ConfigError, match="give bits too"):
        FPConfig(weight_format="nvfp4", by_kind=True)


def test_outer_layers_may_have_8_bits():
    model = tiny_models.make("dit")
    inner, skipped = select_layers(model, AQConfig(bits=2), [])
    targets, _ = select_layers(model, AQConfig(bits=2, outer_bits=8), [])
    outer = {name: config for name, config in targets.items() if name not in inner}
    assert outer and set(outer) == {name for name, why in skipped.items() if why == "outside the repeated blocks"}
    assert all(isinstance(config, RTNConfig) and config.bits == 8 for config in outer.values())
    assert all(isinstance(targets[name], AQConfig) for name in inner)


@pytest.mark.parametrize("settings", [{"outer_bits": 9}, {"outer_bits": 8, "keep_outer_layers": False}])
def test_outer_bits_go_with_outer_layers_that_are_kept(settings):
    with pytest.raises(ConfigError, match="outer_bits must be one of"):
        AQConfig(bits=2, **settings)
