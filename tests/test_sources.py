"""What is quantized: dense checkpoints, those in 8 bits with scales, and those that must not be quantized at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import scaled_files
import tiny_models
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from flux_layout import narrow_converter, original_layout
from safetensors.torch import load_file, save_file
from torch import nn

from qdiff_diffusers import AQConfig, CheckpointError, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.checkpoint.source_weights import read_source_tensors
from qdiff_diffusers.layers import PackedLayer

METHODS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4, group_size=16),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIT, FLUX = DiTTransformer2DModel, FluxTransformer2DModel


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """``dense(name)``: the folder of a tiny model in float32."""
    root = tmp_path_factory.mktemp("dense")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            tiny_models.make(name).save_pretrained(root / name)
        return root / name

    return folder


def written(folder: Path, tensors: dict[str, torch.Tensor], source: Path, metadata: dict[str, str] | None = None) -> Path:
    """A model folder with these tensors and ``source``'s config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} | (metadata or {}))
    return folder


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key].float(), right[key].float()), key


def assert_near(a: nn.Module, b: nn.Module) -> None:
    """The same but for the last bits of matrix products, which differ with the place of a weight in memory."""
    left, right = dict(a.named_modules()), dict(b.named_modules())
    for name, layer in right.items():
        if isinstance(layer, PackedLayer):
            weight = layer.dequantize(torch.float32)
            assert (left[name].dequantize(torch.float32) - weight).norm() < 0.01 * weight.norm(), name


SAME = {method: assert_near if method == "svdquant" else assert_same for method in METHODS}


@pytest.mark.parametrize("scheme", scaled_files.SCHEMES)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_scales_of_a_folder_are_applied_to_every_layer(name, scheme, dense, tmp_path):
    """Also to those that stay in 16 bits, embedders and final projections."""
    file, values = scaled_files.store(load_file(dense(name) / WEIGHTS), scheme)
    kind = type(tiny_models.make(name))
    scaled, plain = (written(tmp_path / f, t, dense(name)) for f, t in (("scaled", file), ("plain", values)))
    models = [kind.from_pretrained(f, quantization_config=RTNConfig(bits=4), dtype=torch.bfloat16) for f in (scaled, plain)]
    assert_same(*models)
    models[0].save_pretrained(tmp_path / "out")
    assert_same(kind.from_pretrained(tmp_path / "out"), models[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["comfy_scaled", "row_scale", "bitsandbytes", "plain_float8"])
def test_every_method_quantizes_what_the_scales_give(method, scheme, dense, tmp_path):
    file, values = scaled_files.store(load_file(dense("dit") / WEIGHTS), scheme)
    scaled, plain = (written(tmp_path / f, t, dense("dit")) for f, t in (("scaled", file), ("plain", values)))
    SAME[method](*(DIT.from_pretrained(f, quantization_config=METHODS[method]()) for f in (scaled, plain)))


def from_file(file: Path, config: Path, quantization: QDiffConfig, **kwargs) -> nn.Module:
    return FLUX.from_single_file(str(file), config=str(config), quantization_config=quantization, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("scheme", scaled_files.SCHEMES)
def test_scales_of_a_single_file_are_applied(scheme, dtype, dense, tmp_path):
    file, values = scaled_files.store(load_file(dense("flux") / WEIGHTS), scheme)
    scaled, plain = (written(tmp_path / f, t, dense("flux")) for f, t in (("scaled", file), ("plain", values)))
    kwargs = {} if dtype is None else {"torch_dtype": dtype}
    models = [from_file(folder / WEIGHTS, dense("flux"), RTNConfig(bits=4), **kwargs) for folder in (scaled, plain)]
    assert_same(*models)
    assert models[0].dtype == (dtype or torch.float32)
    assert tiny_models.run(models[0], "flux").isfinite().all()


@pytest.mark.parametrize("scheme", scaled_files.SCHEMES)
def test_scales_follow_the_rows_that_a_converter_cuts_and_joins(scheme, dense, tmp_path, monkeypatch):
    """Flux under its authors' names: fused projections are cut, the halves of the last modulation change places."""
    narrow_converter(monkeypatch)
    file, values = scaled_files.store(original_layout(load_file(dense("flux") / WEIGHTS)), scheme)
    scaled, plain = (written(tmp_path / f, t, dense("flux")) for f, t in (("scaled", file), ("plain", values)))
    models = [from_file(f / WEIGHTS, dense("flux"), RTNConfig(bits=4), torch_dtype=torch.bfloat16) for f in (scaled, plain)]
    assert_same(*models)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.float8_e5m2, "mixed"], ids=str)
def test_a_file_that_was_cast_to_float8_computes_in_the_dtype_asked_for(method, numbers, dense, tmp_path):
    tensors = load_file(dense("flux") / WEIGHTS)
    kinds = [torch.float8_e4m3fn, torch.float16, torch.float32, torch.bfloat16, torch.float8_e5m2]
    cast = {key: t.to(kinds[i % 5] if numbers == "mixed" else numbers) for i, (key, t) in enumerate(tensors.items())}
    folder = written(tmp_path / "cast", cast, dense("flux"))
    plain = written(tmp_path / "plain", {key: t.float() for key, t in cast.items()}, dense("flux"))
    expected = FLUX.from_pretrained(plain, quantization_config=METHODS[method](), dtype=torch.bfloat16)
    for model in (
        from_file(folder / WEIGHTS, dense("flux"), METHODS[method](), torch_dtype=torch.bfloat16),
        FLUX.from_pretrained(folder, quantization_config=METHODS[method](), torch_dtype=torch.bfloat16),
        FLUX.from_single_file(dict(cast), config=str(dense("flux")), quantization_config=METHODS[method](), dtype=torch.bfloat16),
    ):
        SAME[method](model, expected)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
        output, wanted = (tiny_models.run(m, "flux") for m in (model, expected))
        assert (output - wanted).norm() < 0.02 * wanted.norm()


def test_a_state_dict_that_is_passed_stays_as_it_was(dense):
    tensors, _ = scaled_files.store(load_file(dense("flux") / WEIGHTS), "comfy_scaled")
    before = dict(tensors)
    FLUX.from_single_file(tensors, config=str(dense("flux")), quantization_config=RTNConfig(bits=4))
    assert tensors.keys() == before.keys()
    assert all(tensors[key] is before[key] for key in before)


def test_a_scale_may_lie_in_another_shard_than_its_weight(dense, tmp_path):
    file, values = scaled_files.store(load_file(dense("dit") / WEIGHTS), "row_scale")
    shutil.copy(dense("dit") / "config.json", tmp_path)
    scales = {key: t for key, t in file.items() if key.endswith("_scale")}
    shards = {"a-00001-of-00002.safetensors": scales, "a-00002-of-00002.safetensors": {k: file[k] for k in file.keys() - scales}}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    places = {key: name for name, tensors in shards.items() for key in tensors}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    plain = written(tmp_path / "plain", values, dense("dit"))
    assert_same(*(DIT.from_pretrained(f, quantization_config=RTNConfig(bits=4)) for f in (tmp_path, plain)))


@pytest.mark.parametrize("name", ["sdxl_unet", "vae"])
@pytest.mark.parametrize("scheme", ["comfy_scaled", "row_scale", "plain_float8", "bitsandbytes"])
def test_convolutions_have_scales_too(name, scheme, dense, tmp_path):
    file, values = scaled_files.store(load_file(dense(name) / WEIGHTS), scheme)
    kind = type(tiny_models.make(name))
    scaled, plain = (written(tmp_path / f, t, dense(name)) for f, t in (("scaled", file), ("plain", values)))
    config = RTNConfig(bits=4, keep_outer_layers=False)
    assert_same(*(kind.from_pretrained(f, quantization_config=config, dtype=torch.float16) for f in (scaled, plain)))


@pytest.mark.parametrize("scheme", ["block_scale", "row_scale"])
def test_blocks_that_do_not_divide_a_weight_end_with_it(scheme):
    weight = torch.randn(300, 130)
    file, values = scaled_files.store({"a.weight": weight}, scheme)
    assert file["a.weight_scale_inv" if scheme == "block_scale" else "a.weight_scale"].shape == (
        (3, 2) if scheme == "block_scale" else (300, 1)
    )
    deferred = read_source_tensors(file).defer(dict(file))
    assert deferred.keys() == {"a.weight"}
    assert torch.equal(deferred["a.weight"].decode(), values["a.weight"])
    first, second = deferred["a.weight"].split([150, 150])
    assert torch.equal(torch.cat([second, first]).decode(), values["a.weight"].roll(150, 0))
    assert torch.equal(deferred["a.weight"].T, values["a.weight"].T)  # what is no choice of rows is computed


LAYER = "transformer_blocks.0.attn1.to_q"
WITHOUT_WEIGHT = ("GPTQ", "Nunchaku", "quanto", "torchao", "ours")  # its place is taken by tensors of other names


def numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(32, 32).to(dtype)


REFUSED = {
    "integers": ({f"{LAYER}.weight": numbers(torch.int8)}, r"int8 numbers"),
    "int32": ({f"{LAYER}.weight": numbers(torch.int32)}, r"int32 numbers"),
    "bools": ({f"{LAYER}.weight": numbers(torch.bool)}, r"bool numbers"),
    "complex": ({f"{LAYER}.weight": numbers(torch.complex64)}, r"complex64 numbers"),
    "integer bias": ({f"{LAYER}.bias": torch.ones(32, dtype=torch.int64)}, r"int64 numbers"),
    "bitsandbytes 4-bit": (
        {f"{LAYER}.weight": torch.ones(512, 1, dtype=torch.uint8)}
        | {f"{LAYER}.weight.{leaf}": torch.ones(16) for leaf in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")},
        r"bitsandbytes' 4-bit",
    ),
    "GPTQ": (
        {f"{LAYER}.{leaf}": torch.ones(4, 4, dtype=torch.int32) for leaf in ("qweight", "qzeros", "scales")},
        r"GPTQ's or AWQ's",
    ),
    "Nunchaku": (
        {f"{LAYER}.{leaf}": torch.ones(4, 4, dtype=torch.int8) for leaf in ("qweight", "wscales")},
        r"qdiff convert nunchaku",
    ),
    "quanto": ({f"{LAYER}.weight._data": numbers(torch.int8), f"{LAYER}.weight._scale": torch.ones(32, 1)}, r"quanto's"),
    "torchao": ({f"{LAYER}._weight_qdata": numbers(torch.int8), f"{LAYER}._weight_scale": torch.ones(32)}, r"torchao's"),
    "NVFP4": (
        {
            f"{LAYER}.weight": torch.ones(32, 16, dtype=torch.uint8),
            f"{LAYER}.weight_scale": torch.ones(32, 2).to(torch.float8_e4m3fn),
            f"{LAYER}.weight_scale_2": torch.ones(()),
        },
        r"NVFP4.*qdiff convert bfl",
    ),
    "mxfp8": (
        {
            f"{LAYER}.weight": numbers(torch.float8_e4m3fn),
            f"{LAYER}.weight_scale": torch.ones(32, 1, dtype=torch.uint8),
            f"{LAYER}.comfy_quant": scaled_files.description({"format": "mxfp8"}),
        },
        r"ComfyUI's format mxfp8",
    ),
    "rotated int8": (
        {
            f"{LAYER}.weight": numbers(torch.int8),
            f"{LAYER}.weight_scale": torch.ones(32, 1),
            f"{LAYER}.comfy_quant": scaled_files.description({"format": "int8_tensorwise", "convrot": True}),
        },
        r"int8_tensorwise with convrot=True",
    ),
    "no scale": (
        {
            f"{LAYER}.weight": numbers(torch.float8_e4m3fn),
            f"{LAYER}.comfy_quant": scaled_files.description({"format": "float8_e4m3fn"}),
        },
        r"has no scale",
    ),
    "garbled description": (
        {f"{LAYER}.comfy_quant": torch.tensor([200, 3], dtype=torch.uint8)},
        r"malformed description of ComfyUI's formats",
    ),
    "zero points": (
        {
            f"{LAYER}.weight": numbers(torch.int8),
            f"{LAYER}.weight_scale": torch.ones(32, 1),
            f"{LAYER}.weight_zero_point": torch.ones(32, 1, dtype=torch.int8),
        },
        r"weight_zero_point.*not known here",
    ),
    "SDNQ": (
        {f"{LAYER}.weight": numbers(torch.float8_e4m3fn), f"{LAYER}.scale": torch.ones(32, 1)},
        rf"{LAYER}\.scale.*not known here",
    ),
    "two scales": (
        {
            f"{LAYER}.weight": numbers(torch.float8_e4m3fn),
            f"{LAYER}.weight_scale": torch.ones(()),
            f"{LAYER}.scale_weight": torch.ones(()),
        },
        r"several scales",
    ),
    "columns": (
        {f"{LAYER}.weight": numbers(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(1, 32)},
        r"weight_scale is float32 \[1, 32\], which is no scale",
    ),
    "groups of int8": (
        {f"{LAYER}.weight": numbers(torch.int8), f"{LAYER}.weight_scale": torch.ones(32, 2)},
        r"\[32, 2\], which is no scale",
    ),
    "scaled floats": ({f"{LAYER}.weight_scale": torch.full((), 0.5)}, r"torch.float32, so what its .*weight_scale means"),
    "lonely scale": ({"somewhere.weight_scale": torch.ones(())}, r"somewhere\.weight_scale, but no weight"),
    "ours": ({f"{LAYER}.codes": torch.ones(32, 16, dtype=torch.uint8)}, r"qdiff's layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_before_a_weight_is_quantized(case, dense, tmp_path, monkeypatch):
    change, message = REFUSED[case]
    tensors = load_file(dense("dit") / WEIGHTS)
    if case in WITHOUT_WEIGHT:
        del tensors[f"{LAYER}.weight"]
    folder = written(tmp_path / "model", tensors | change, dense("dit"))
    monkeypatch.setattr(
        "qdiff_diffusers.integrations.diffusers_quantizer.quantize_layer", lambda *_: pytest.fail("a layer was quantized")
    )
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        DIT.from_pretrained(folder, quantization_config=RTNConfig(bits=4))


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("complex", "ours")])
def test_the_same_is_refused_in_a_single_file(case, dense, tmp_path):
    change, message = REFUSED[case]
    change = {key.replace("attn1", "attn"): t for key, t in change.items()}
    folder = written(tmp_path / "model", load_file(dense("flux") / WEIGHTS) | change, dense("flux"))
    with pytest.raises(CheckpointError, match=f"(?s){message.replace('attn1', 'attn')}"):
        from_file(folder / WEIGHTS, dense("flux"), RTNConfig(bits=4))


def test_a_truth_value_where_the_model_has_a_number_is_refused(dense, tmp_path):
    tensors = load_file(dense("wan") / WEIGHTS)
    name = "scale_shift_table"
    folder = written(tmp_path / "model", tensors | {name: tensors[name].bool()}, dense("wan"))
    with pytest.raises(CheckpointError, match=rf"{name} is bool in "):
        type(tiny_models.make("wan")).from_pretrained(folder, quantization_config=RTNConfig(bits=4))


def test_a_scale_of_one_beside_a_weight_in_16_bits_changes_nothing(dense, tmp_path):
    """Some of ComfyUI's files have one beside every layer that they left as it was."""
    tensors = load_file(dense("dit") / WEIGHTS)
    folder = written(tmp_path / "model", tensors | {f"{LAYER}.scale_weight": torch.ones(())}, dense("dit"))
    assert_same(*(DIT.from_pretrained(f, quantization_config=RTNConfig(bits=4)) for f in (folder, dense("dit"))))


@pytest.mark.parametrize("rotated", [False, True])
def test_what_a_files_metadata_say_of_its_weights_counts(rotated, dense, tmp_path):
    """ComfyUI may describe formats there instead of in tensors; a rotated weight looks like any other."""
    file, values = scaled_files.store(load_file(dense("flux") / WEIGHTS), "int8_rows")
    module = "transformer_blocks.0.attn.to_q"
    layers = {module: {"format": "int8_tensorwise", "convrot": rotated}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    folder = written(tmp_path / "scaled", file, dense("flux"), metadata)
    plain = written(tmp_path / "plain", values, dense("flux"))
    loads = (
        lambda f: FLUX.from_pretrained(f, quantization_config=RTNConfig(bits=4)),
        lambda f: from_file(f / WEIGHTS, dense("flux"), RTNConfig(bits=4)),
    )
    for load in loads:
        if rotated:
            with pytest.raises(CheckpointError, match=rf"{module}.*convrot=True"):
                load(folder)
        else:
            assert_same(load(folder), load(plain))


@pytest.mark.parametrize("place", [LAYER, "pos_embed.proj"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_scale_that_is_not_finite_is_an_error_that_names_the_layer(place, bad, dense, tmp_path):
    file, _ = scaled_files.store(load_file(dense("dit") / WEIGHTS), "weight_scale")
    file[f"{place}.weight_scale"] = torch.tensor(bad)
    folder = written(tmp_path / "model", file, dense("dit"))
    with pytest.raises(CheckpointError, match=rf"{place}\.weight holds NaN or infinity"):
        DIT.from_pretrained(folder, quantization_config=RTNConfig(bits=4))


def test_a_gguf_file_is_named(dense, monkeypatch):
    class GGUFParameter(nn.Parameter):
        pass

    tensors = {key: GGUFParameter(t) for key, t in load_file(dense("flux") / WEIGHTS).items()}
    with pytest.raises(CheckpointError, match="qdiff convert gguf"):
        FLUX.from_single_file(tensors, config=str(dense("flux")), quantization_config=RTNConfig(bits=4))


def test_a_dtype_that_nothing_computes_in_is_refused_before_loading(dense):
    from qdiff_diffusers import ConfigError

    with pytest.raises(ConfigError, match=r"dtype must be one of float32.*float8_e4m3fn"):
        DIT.from_pretrained(dense("dit"), quantization_config=RTNConfig(bits=4), torch_dtype=torch.float8_e4m3fn)
