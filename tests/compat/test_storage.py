"""Copies, casts, saving and loading."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import tiny_models
import torch
from compat.conftest import METHODS, distance
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models import modeling_utils
from torch import nn

from qdiff_diffusers import ConfigError
from qdiff_diffusers.layers import PackedLayer


def run(model: nn.Module) -> torch.Tensor:
    return tiny_models.run(model, "flux")


def packed(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLayer) for module in model.modules())


@pytest.mark.row("deepcopy")
def test_deepcopy(load):
    model = load()
    copied = copy.deepcopy(model)
    model.transformer_blocks[0].attn.to_q.codes.data.zero_()
    assert torch.equal(run(copied), run(load()))


@pytest.mark.row("pickle")
def test_pickle(load):
    model = load()
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), run(model))


@pytest.mark.row("`.to(dtype)`")
def test_to_dtype(load, refuses):
    model = load()
    expected, dtypes = run(model), {name: t.dtype for name, t in model.state_dict().items()}
    with refuses("torch_dtype"):
        model.to(torch.bfloat16)
    assert {name: t.dtype for name, t in model.state_dict().items()} == dtypes
    assert torch.equal(run(model), expected)
    assert model.to(dtype=torch.float32) is model and model.to("cpu", torch.float32) is model  # what it has already
    assert {name: t.dtype for name, t in model.state_dict().items()} == dtypes
    assert torch.equal(run(model), expected)


@pytest.mark.row("`.bfloat16()`, then save")
def test_bfloat16(load, tmp_path):
    model = load()
    scales = {name: t.dtype for name, t in model.named_buffers() if name.endswith(".scales")}
    model.bfloat16()
    assert {name: t.dtype for name, t in model.named_buffers() if name.endswith(".scales")} == scales
    model.save_pretrained(tmp_path)
    reloaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(run(reloaded), run(model))


@pytest.mark.row("load in another dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_load_in_another_dtype(load, dtype):
    model = load(dtype=dtype)
    assert model.dtype == dtype
    assert (run(model).float() - run(load())).norm() / run(load()).norm() < 0.3


@pytest.mark.row("variant")
def test_variant(load, tmp_path):
    model = load()
    model.save_pretrained(tmp_path, variant="q")
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path, variant="q")), run(model))


@pytest.mark.row("sharding")
def test_sharding(load, tmp_path):
    model = load()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path)), run(model))


@pytest.mark.row("parallel loading")
def test_parallel_loading(load, tmp_path, monkeypatch):
    model = load()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path)), run(model))


@pytest.mark.row("parallel loading while quantizing")
def test_parallel_quantizing(load, tmp_path, dense_folder, method, monkeypatch, note):
    """It falls back to loading file by file: quantizing changes the dictionaries that other threads would iterate over."""
    note("files are read one after the other")
    FluxTransformer2DModel.from_pretrained(dense_folder("flux")).save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=METHODS[method]())
    assert distance(run(model), run(load())) < 1e-2


@pytest.mark.row("dequantize(), save, plain load")
def test_dequantize(load, tmp_path):
    model = load()
    model.dequantize()
    assert packed(model) == 0
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.allclose(run(FluxTransformer2DModel.from_pretrained(tmp_path)), run(model), atol=1e-5)


@pytest.mark.row("get_memory_footprint")
def test_memory_footprint(load, dense_folder):
    model = load()
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(t.nbytes for t in tensors)
    assert model.get_memory_footprint(return_buffers=False) == sum(p.nbytes for p in model.parameters())


def dit_pipeline(transformer: nn.Module) -> DiTPipeline:
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8
    )
    return DiTPipeline(transformer, vae, DDIMScheduler(), {0: "shirt", 1: "shoe"})


def dtypes(pipe) -> dict[str, torch.dtype]:
    return {f"{part}.{name}": t.dtype for part in ("vae", "transformer") for name, t in getattr(pipe, part).state_dict().items()}


@pytest.mark.row("Pipeline.from_pipe")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pipe(load, note, dtype):
    """diffusers casts every component, to float32 unless told otherwise."""
    note("pass `torch_dtype=` of the quantized component: diffusers casts to float32 otherwise, which is refused")
    pipe = dit_pipeline(load("dit", dtype=dtype))
    pipe.vae.to(dtype)
    other = DiTPipeline.from_pipe(pipe, torch_dtype=dtype)
    assert other.transformer is pipe.transformer
    assert other.vae.dtype == other.transformer.dtype == dtype
    assert torch.equal(tiny_models.run(other.transformer, "dit"), tiny_models.run(load("dit", dtype=dtype), "dit"))


def test_from_pipe_in_another_dtype_is_refused_and_changes_nothing(tmp_path):
    tiny_models.make("dit").save_pretrained(tmp_path)
    kind = type(tiny_models.make("dit"))
    pipe = dit_pipeline(kind.from_pretrained(tmp_path, quantization_config=METHODS["rtn"](), dtype=torch.bfloat16))
    before = dtypes(pipe)
    with pytest.raises(ConfigError, match=r"'transformer' is quantized.*torch_dtype=torch\.bfloat16"):
        DiTPipeline.from_pipe(pipe)
    assert dtypes(pipe) == before


@pytest.mark.row("AutoPipeline.from_pipe")
def test_auto_pipeline_from_pipe(load):
    from diffusers import AutoPipelineForImage2Image

    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=load(), vae=vae, **parts)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is FluxImg2ImgPipeline
    assert other.transformer is pipe.transformer


@pytest.mark.row("Pipeline(**pipe.components)")
def test_components(load):
    pipe = dit_pipeline(load("dit"))
    kept = {name: part for name, part in pipe.components.items() if name != "id2label"}
    assert DiTPipeline(**kept).transformer is pipe.transformer


@pytest.mark.row("pipe.to(dtype)")
@pytest.mark.parametrize("order", [("vae", "transformer"), ("transformer", "vae")], ids="-".join)
def test_pipeline_to_dtype(load, refuses, order, monkeypatch):
    """Whichever component comes first: diffusers would have cast those before the quantized one."""
    pipe = dit_pipeline(load("dit"))
    parts, before = pipe.components, dtypes(pipe)
    monkeypatch.setattr(DiTPipeline, "_get_signature_keys", classmethod(lambda cls, obj: ([*order, "scheduler"], {})))
    monkeypatch.setattr(DiTPipeline, "components", property(lambda self: {name: parts[name] for name in order}))
    with refuses("cannot be cast to torch.bfloat16"):
        pipe.to(torch.bfloat16)
    assert dtypes(pipe) == before
    assert pipe.to("cpu", torch.float32) is pipe  # what it has already
    assert dtypes(pipe) == before


@pytest.mark.row("pipeline save and reload")
def test_pipeline_round_trip(load, tmp_path, note):
    note("DiTPipeline does not save its `id2label`, dense or quantized")
    pipe = dit_pipeline(load("dit"))
    pipe.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.run(reloaded.transformer, "dit"), tiny_models.run(pipe.transformer, "dit"))


@pytest.mark.row("from_single_file")
def test_single_file(load, tmp_path):
    from qdiff_diffusers import inspect_checkpoint

    load().save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    config = inspect_checkpoint(tmp_path).config
    model = FluxTransformer2DModel.from_single_file(str(file), config=str(tmp_path), quantization_config=config)
    assert torch.equal(run(model), run(load()))
