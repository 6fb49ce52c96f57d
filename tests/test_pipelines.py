"""Whole pipelines and text encoders, through diffusers' and transformers' own doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PipelineQuantizationConfig,
)
from safetensors.torch import load_file, save_file

from qdiff_diffusers import (
    AQConfig,
    Calibration,
    CheckpointError,
    FPConfig,
    RTNConfig,
    SVDQuantConfig,
    VQConfig,
    inspect_checkpoint,
    quantize,
)
from qdiff_diffusers.layers import PackedLayer

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "aq-shared": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1, activations="fp8"),
    "fp": lambda: FPConfig(weight_format="nvfp4", activations="int8"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, activations="int4"),
    "rtn": lambda: RTNConfig(bits=4),
}


def clip() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    others = {"projection_dim": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **others))


def t5() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


ENCODERS = {"clip": clip, "t5": t5}
TOKENS = torch.tensor([[0, 5, 9, 33, 60, 2, 7, 1]])


@pytest.fixture(scope="session")
def dense_encoders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    for name, make in ENCODERS.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in ENCODERS}


def load_encoder(name: str, folder: Path, **kwargs):
    return type(ENCODERS[name]()).from_pretrained(folder, **kwargs)


def packed(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]


def assert_same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key].view(torch.uint8), right[key].view(torch.uint8)), key


@torch.no_grad()
def encode(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_encoder_survives_save_and_reload(name, method, dtype, dense_encoders, tmp_path):
    config = CONFIGS[method]()
    model = load_encoder(name, dense_encoders[name], quantization_config=config, dtype=dtype)
    assert len(packed(model)) >= 10
    assert model.config.quantization_config.layers.keys() == set(packed(model))
    assert config == CONFIGS[method]()
    output = encode(model)
    assert torch.isfinite(output).all()
    model.save_pretrained(tmp_path)
    for given in ({}, {"dtype": dtype}):
        reloaded = load_encoder(name, tmp_path, **given)
        assert_same_tensors(reloaded, model)
        assert torch.equal(encode(reloaded), output)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_encoder_at_eight_bits_is_near_the_dense_one(name, dense_encoders):
    exact = encode(load_encoder(name, dense_encoders[name]))
    close = encode(load_encoder(name, dense_encoders[name], quantization_config=RTNConfig(bits=8)))
    assert (close - exact).norm() / exact.norm() < 0.02


def test_a_sharded_text_encoder_is_equal_to_a_single_file(dense_encoders, tmp_path):
    model = load_encoder("t5", dense_encoders["t5"], quantization_config=RTNConfig(bits=4), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = load_encoder("t5", tmp_path)
    assert_same_tensors(reloaded, model)
    assert torch.equal(encode(reloaded), encode(model))


def test_a_dequantized_text_encoder_saves_as_an_ordinary_one(dense_encoders, tmp_path):
    model = load_encoder("clip", dense_encoders["clip"], quantization_config=RTNConfig(bits=4))
    quantized = encode(model)
    model.dequantize()
    assert not packed(model)
    assert torch.allclose(encode(model), quantized, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(encode(load_encoder("clip", tmp_path)), encode(model))


def test_embeddings_and_layers_that_transformers_keeps_are_listed(dense_encoders):
    skipped = load_encoder("t5", dense_encoders["t5"], quantization_config=RTNConfig(bits=4)).config.quantization_config.skipped
    assert "float32" in skipped["encoder.block.0.layer.1.DenseReluDense.wo"]
    assert "embedding that overrides does not name" in skipped["shared"]


def damage(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{LAYER}.codes"), f"{LAYER}.codes"),
        (lambda t: t.pop(f"{LAYER}.scales"), f"{LAYER}.scales"),
        (lambda t: t.pop(f"{LAYER}.bias"), f"{LAYER}.bias"),
        (lambda t: t.pop("embeddings.token_embedding.weight"), "token_embedding.weight"),
        (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:-1].clone()}), f"{LAYER}.scales is float16"),
        (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}), f"{LAYER}.scales is float32"),
    ],
    ids=["no codes", "no scales", "no bias", "no embedding", "misshapen", "dtype"],
)
def test_an_incomplete_text_encoder_is_refused_rather_than_filled_with_random_numbers(change, named, dense_encoders, tmp_path):
    """transformers itself only logs what is missing and initialises it."""
    load_encoder("clip", dense_encoders["clip"], quantization_config=RTNConfig(bits=4)).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(CheckpointError, match=named):
        load_encoder("clip", tmp_path)


def test_a_truncated_text_encoder_is_refused_by_name(dense_encoders, tmp_path):
    load_encoder("clip", dense_encoders["clip"], quantization_config=RTNConfig(bits=4)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_encoder("clip", tmp_path)


def test_a_text_encoder_of_an_unknown_version_is_refused(dense_encoders, tmp_path):
    load_encoder("clip", dense_encoders["clip"], quantization_config=RTNConfig(bits=4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 7"):
        load_encoder("clip", tmp_path)


@pytest.fixture(scope="session")
def dit_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit-pipeline")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8
    )
    DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler(), {0: "shirt", 1: "shoe"}).save_pretrained(folder)
    return folder


NO_TOKENIZERS = {"tokenizer": None, "tokenizer_2": None}


@pytest.fixture(scope="session")
def flux_pipeline(tmp_path_factory) -> Path:
    """A Flux pipeline with both text encoders and no tokenizers; prompts are given as embeddings."""
    folder = tmp_path_factory.mktemp("flux-pipeline")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=8,
        latent_channels=1,
        shift_factor=0.0,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip(),
        text_encoder_2=t5(),
        **NO_TOKENIZERS,
        transformer=tiny_models.make("flux"),
    ).save_pretrained(folder)
    return folder


def generate_dit(pipe: DiTPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe([0, 1], guidance_scale=1.0, generator=generator, num_inference_steps=2, output_type="np").images)


def generate_flux(pipe: FluxPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pooled, embeddings = pipe.text_encoder(TOKENS).pooler_output, pipe.text_encoder_2(TOKENS)[0]
    return pipe(
        prompt_embeds=embeddings.to(pipe.dtype),
        pooled_prompt_embeds=pooled.to(pipe.dtype),
        height=8,
        width=8,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images


def test_prompts_embeddings_calibrate_a_pipeline_that_has_no_text_encoders_in_memory(flux_pipeline, tmp_path):
    """The recipe of docs/calibration.md: what is fitted is what the whole pipeline's embeddings fit, bit for bit."""
    whole = FluxPipeline.from_pretrained(flux_pipeline, **NO_TOKENIZERS)
    with torch.no_grad():
        held = {"prompt_embeds": whole.text_encoder_2(TOKENS)[0], "pooled_prompt_embeds": whole.text_encoder(TOKENS).pooler_output}
    config = SVDQuantConfig(bits=4, rank=2, rounds=1)

    def fitted(pipe: FluxPipeline, output: Path) -> Any:
        def run(pipe, samples, generators):
            embeddings = {name: tensor[[i % len(tensor) for i in samples]] for name, tensor in held.items()}
            pipe(**embeddings, height=8, width=8, num_inference_steps=2, generator=generators, output_type="latent")

        calibration = Calibration(run=run, run_key="these embeddings", samples=2, batch_size=1)
        return quantize(pipe, config, output, calibration=calibration, components="transformer")

    alone = FluxPipeline.from_pretrained(flux_pipeline, text_encoder=None, text_encoder_2=None, **NO_TOKENIZERS)
    fitted(alone, tmp_path / "alone")
    fitted(whole, tmp_path / "whole")
    found, expected = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("alone", "whole")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)
    assert not (tmp_path / "alone" / "text_encoder_2").exists()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_component_is_quantized_through_a_quant_mapping_and_the_pipeline_reloads_exactly(method, dit_pipeline, tmp_path):
    config = CONFIGS[method]()
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = DiTPipeline.from_pretrained(dit_pipeline, quantization_config=mapping)
    assert packed(pipe.transformer)
    assert not packed(pipe.vae)
    images = generate_dit(pipe)
    pipe.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(reloaded) is DiTPipeline
    assert_same_tensors(reloaded.transformer, pipe.transformer)
    assert torch.equal(generate_dit(reloaded), images)
    assert inspect_checkpoint(tmp_path).layers


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_pipeline_reloads_exactly_in_the_precision_it_was_made_in(dtype, dit_pipeline, tmp_path):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTNConfig(bits=4)})
    given = {"torch_dtype": dtype} if dtype else {}
    pipe = DiTPipeline.from_pretrained(dit_pipeline, quantization_config=mapping, **given)
    pipe.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path, **given)
    assert reloaded.transformer.dtype == pipe.transformer.dtype
    assert torch.equal(generate_dit(reloaded), generate_dit(pipe))


@pytest.mark.parametrize(
    "kwargs", [{"method": "rtn", "bits": 4}, {"method": "fp", "bits": 4}, {"method": "svdquant", "rank": 2}], ids=str
)
def test_components_are_quantized_through_a_backend_name(kwargs, dit_pipeline):
    config = PipelineQuantizationConfig(quant_backend="qdiff", quant_kwargs=kwargs, components_to_quantize=["transformer"])
    pipe = DiTPipeline.from_pretrained(dit_pipeline, quantization_config=config)
    assert packed(pipe.transformer)
    assert not packed(pipe.vae)
    assert pipe.transformer.config.quantization_config.method == kwargs["method"]
    assert "qdiff" in repr(config)


@pytest.mark.parametrize(("named", "with_vae"), [({}, False), ({"components_to_quantize": ["transformer", "vae"]}, True)], ids=str)
def test_a_backend_name_without_components_means_everything_but_the_vae(named, with_vae, dit_pipeline):
    config = PipelineQuantizationConfig(quant_backend="qdiff", quant_kwargs={"method": "rtn", "bits": 8}, **named)
    pipe = DiTPipeline.from_pretrained(dit_pipeline, quantization_config=config)
    assert packed(pipe.transformer)
    assert bool(packed(pipe.vae)) is with_vae
    assert torch.isfinite(generate_dit(pipe)).all()


def test_text_encoders_and_transformer_share_one_config_and_reload_exactly(flux_pipeline, tmp_path):
    """The usual way to write it: one config object for every component."""
    config = SVDQuantConfig(bits=4, rank=2, rounds=1)
    components = ("transformer", "text_encoder", "text_encoder_2")
    mapping = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(components, config))
    pipe = FluxPipeline.from_pretrained(flux_pipeline, quantization_config=mapping, torch_dtype=torch.bfloat16, **NO_TOKENIZERS)
    for name in components:
        component = getattr(pipe, name)
        assert component.config.quantization_config.layers.keys() == set(packed(component))
    pipe.save_pretrained(tmp_path)
    reloaded = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **NO_TOKENIZERS)
    for name in components:
        assert_same_tensors(getattr(reloaded, name), getattr(pipe, name))
    assert torch.equal(generate_flux(reloaded), generate_flux(pipe))


def test_components_may_have_different_methods(flux_pipeline, tmp_path):
    methods = {"transformer": FPConfig(weight_format="nvfp4"), "text_encoder": CONFIGS["vq"](), "text_encoder_2": RTNConfig(bits=8)}
    mapping = PipelineQuantizationConfig(quant_mapping=methods)
    pipe = FluxPipeline.from_pretrained(flux_pipeline, quantization_config=mapping, **NO_TOKENIZERS)
    pipe.save_pretrained(tmp_path)
    reloaded = FluxPipeline.from_pretrained(tmp_path, **NO_TOKENIZERS)
    for name, config in methods.items():
        assert getattr(reloaded, name).config.quantization_config.method == config.method
        assert_same_tensors(getattr(reloaded, name), getattr(pipe, name))
    assert not packed(reloaded.vae)
    assert torch.equal(generate_flux(reloaded), generate_flux(pipe))


def test_a_pipeline_config_may_be_used_again(dit_pipeline):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTNConfig(bits=4)})
    first, second = (DiTPipeline.from_pretrained(dit_pipeline, quantization_config=mapping) for _ in range(2))
    assert_same_tensors(first.transformer, second.transformer)


@pytest.mark.parametrize("kwargs", [{"method": "gptq"}, {"bits": 4}, {"method": "rtn", "bits": 40}], ids=str)
def test_wrong_settings_in_a_pipeline_config_are_refused(kwargs, dit_pipeline):
    config = PipelineQuantizationConfig(quant_backend="qdiff", quant_kwargs=kwargs, components_to_quantize=["transformer"])
    with pytest.raises(ValueError, match=r"method must be one of|bits must be one of"):
        DiTPipeline.from_pretrained(dit_pipeline, quantization_config=config)


def test_a_damaged_component_stops_the_whole_pipeline(dit_pipeline, tmp_path):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTNConfig(bits=4)})
    DiTPipeline.from_pretrained(dit_pipeline, quantization_config=mapping).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("transformer_blocks.0.attn1.to_q.codes")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"attn1\.to_q\.codes"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_components_of_a_quantized_pipeline_go_into_another(dit_pipeline):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTNConfig(bits=4)})
    pipe = DiTPipeline.from_pretrained(dit_pipeline, quantization_config=mapping)
    twin = DiTPipeline(**pipe.components)
    assert torch.equal(generate_dit(twin), generate_dit(pipe))
    quantized = type(pipe.transformer).from_pretrained(dit_pipeline, subfolder="transformer", quantization_config=RTNConfig(bits=4))
    assert torch.equal(generate_dit(DiTPipeline.from_pretrained(dit_pipeline, transformer=quantized)), generate_dit(pipe))


def test_registering_again_changes_nothing():
    from diffusers.quantizers import auto

    import qdiff_diffusers

    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    qdiff_diffusers.register()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qdiff"]
    assert known(method="rtn", bits=4) == RTNConfig(bits=4)
    assert isinstance(RTNConfig(bits=4), known)
    assert not isinstance({"quant_method": "qdiff"}, known)


def test_an_unquantized_pipeline_is_left_alone(dit_pipeline, tmp_path):
    folder = Path(shutil.copytree(dit_pipeline, tmp_path / "copy"))
    pipe = DiTPipeline.from_pretrained(folder)
    assert not packed(pipe.transformer)
    assert not getattr(pipe.transformer, "is_quantized", False)


def test_a_transformers_too_old_for_text_encoders_is_reported_on_import(monkeypatch):
    from transformers.quantizers import auto

    from qdiff_diffusers.integrations import registration

    warnings: list[str] = []
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qdiff", None)  # which registering replaces by a refusal
    monkeypatch.setattr(registration, "is_transformers_version", lambda operation, version: True)
    monkeypatch.setattr(registration.logger, "warning", warnings.append)
    registration.register()
    assert ["transformers 5.0" in warning for warning in warnings] == [True]
