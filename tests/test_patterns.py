"""Parts of module names in a config: those that match nothing are told, once, with what is near."""

from __future__ import annotations

import logging

import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PipelineQuantizationConfig

from qdiff_diffusers import AQConfig, ConfigError, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.config import METHODS
from qdiff_diffusers.model.patterns import nearest_names, one_config_for_all
from qdiff_diffusers.model.selection import select_layers

EMPTY = [{"modules_to_not_convert": ["norm", ""]}, {"modules_to_not_convert": ""}, {"overrides": {"": None}}]
CONFIGS = [AQConfig, VQConfig, FPConfig, SVDQuantConfig, RTNConfig]


@pytest.fixture
def said(caplog):
    """What was logged; the messages about patterns among it."""
    logger = logging.getLogger("qdiff_diffusers")
    logger.addHandler(caplog.handler)

    def messages() -> list[str]:
        return [
            r.getMessage() for r in caplog.records if "modules_to_not_convert:" in r.getMessage() or "overrides:" in r.getMessage()
        ]

    yield messages
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pattern_that_matches_nothing_is_told_with_what_is_near(kind, said):
    config = kind(modules_to_not_convert=["atn1.to_q", "to_v"], overrides={"feed_forward": None, "to_k": RTNConfig(bits=8)})
    select_layers(tiny_models.make("dit"), config, [])
    skip, override = dict.fromkeys(said())
    assert "modules_to_not_convert: no module of DiTTransformer2DModel has 'atn1.to_q' in its name" in skip and "attn1.to_q" in skip
    assert "overrides: no module of DiTTransformer2DModel has 'feed_forward' in its name" in override


@pytest.mark.parametrize("name", tiny_models.MODELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_say_nothing(kind, name, said):
    select_layers(tiny_models.make(name), kind(), list(getattr(tiny_models.make(name), "_keep_in_fp32_modules", None) or []))
    assert not said()


def test_a_pattern_for_modules_without_weights_is_no_mistake(said):
    select_layers(tiny_models.make("dit"), RTNConfig(modules_to_not_convert=["norm3"]), [])
    assert not said()


def test_an_override_that_never_comes_first_is_told(said):
    overrides = {"attn1": RTNConfig(bits=8), "attn1.to_q": None, "ff": None}
    select_layers(tiny_models.make("dit"), RTNConfig(bits=4, modules_to_not_convert=["ff.net"], overrides=overrides), [])
    messages = list(dict.fromkeys(said()))
    assert len(messages) == 2 and all("never applies in DiTTransformer2DModel" in text for text in messages)
    assert "'attn1.to_q'" in messages[0] and "'ff'" in messages[1]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("settings", EMPTY)
def test_an_empty_pattern_is_refused(kind, settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} has an empty pattern ''"):
        kind(**settings)


def test_one_config_for_several_models_warns_only_of_what_none_of_them_has(said):
    config = RTNConfig(modules_to_not_convert=["attn1", "time_text_embed", "nowhere"])
    with one_config_for_all():
        for name in ("dit", "flux"):
            select_layers(tiny_models.make(name), config, [])
    assert len(set(said())) == 1 and "'nowhere'" in said()[0]


@pytest.mark.parametrize("method", METHODS)
def test_loading_warns_once(method, tmp_path, said):
    tiny_models.make("dit").save_pretrained(tmp_path)
    quick = {"aq": {"effort": 0, "bits": 2}, "vq": {"restarts": 1}}.get(method, {})
    config = QDiffConfig(method=method, modules_to_not_convert=["no_such_layer"], **quick)
    model = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert len(set(said())) == 1 and "'no_such_layer'" in said()[0]
    assert model.config.quantization_config.layers


def test_a_pipeline_tells_once_all_components_are_there(tmp_path, said):
    """One config for two models, another for a third: what neither of the two has is told, and the other's own mistake."""
    from diffusers import DiTPipeline

    dit = tiny_models.make("dit")
    DiTPipeline(transformer=dit, vae=tiny_models.make("vae"), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    config = RTNConfig(bits=8, modules_to_not_convert=["attn1", "mid_block", "nowhere"])
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config, "vae": config})
    pipe = DiTPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    assert pipe.transformer.is_quantized and pipe.vae.is_quantized
    assert len(set(said())) == 1 and "'nowhere'" in said()[0]
    other = RTNConfig(bits=8, overrides={"nothing_here": None})
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTNConfig(bits=8), "vae": other})
    DiTPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    assert len(set(said())) == 2 and "AutoencoderKL" in said()[-1] and "'nothing_here'" in said()[-1]


def test_names_that_are_near_are_of_as_many_parts():
    modules = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.0.ff.net.0.proj"]
    assert nearest_names("attn.to_q", modules)[0] == "attn1.to_q"
    assert nearest_names("prj", modules) == ["proj"]
    assert nearest_names("zzzzzz", modules) == []
