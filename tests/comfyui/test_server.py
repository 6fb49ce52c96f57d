"""The pack inside a running ComfyUI: nodes are there, graphs run, bad input is a message and never the end of the server."""

from __future__ import annotations

import os
import shutil
import urllib.request

import numpy as np
import pytest
from comfyui.conditioned import around
from comfyui.models_folder import ELSEWHERE, FAMILIES, ODD
from comfyui.server import node, pictures
from comfyui.test_patches import METHODS
from safetensors import safe_open
from safetensors.torch import save_file

NODES = {
    "QDiffLoadModel",
    "QDiffLoadCLIP",
    "QDiffQuantizeModel",
    "QDiffSaveModel",
    "QDiffLoadPipeline",
    "QDiffSamplePipeline",
    "QDiffModelInfo",
    "QDiffReport",
    "QDiffCompare",
}


def sampling(family, *, steps=2, model=("model", 0)):
    return {
        "model": node("QDiffLoadModel", checkpoint=family, dtype="auto", kernels="auto"),
        **around(family),
        "sample": node(
            "KSampler",
            model=list(model),
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            seed=5,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=f"test-{family}"),
    }


def shown(server, result, name):
    """The picture that one node shows."""
    return pictures(server, {"error": result["error"], "outputs": {name: result["outputs"][name]}})[0]


def test_every_node_is_there_with_help(server):
    info = server.get("/object_info")
    assert set(info) >= NODES
    for name in NODES:
        assert info[name]["description"] and info[name]["category"].startswith("qdiff")
        inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
        assert inputs


@pytest.mark.parametrize("locale", ["de", "fr"])
def test_every_node_speaks_three_languages(locale, server):
    """Names, tooltips and help pages; a page is headed by what the node is called."""
    info, words = server.get("/object_info"), server.get("/i18n")[locale]["nodeDefs"]
    for name in NODES:
        said = words[name]
        inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
        assert set(said["inputs"]) == set(inputs)
        for key, spec in inputs.items():
            assert said["inputs"][key]["name"] and ("tooltip" in said["inputs"][key]) == (
                "tooltip" in (spec[1] if spec[1:] else {})
            )
        titles = {f"{name}.md": info[name]["display_name"], f"{name}/{locale}.md": said["display_name"]}
        for page, title in titles.items():
            with urllib.request.urlopen(f"{server.url}/extensions/qdiff/docs/{page}", timeout=30) as answer:
                assert answer.read().decode().startswith(f"# {title}\n\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_samples_with_the_stock_sampler(family, server):
    image = pictures(server, server.run(sampling(family)))[0]
    assert image.std() > 5


@pytest.mark.parametrize("checkpoint", [ODD, ELSEWHERE])
def test_checkpoints_are_found_by_odd_names_and_in_other_folders(checkpoint, server):
    loader = server.get("/object_info/QDiffLoadModel")["QDiffLoadModel"]["input"]["required"]
    offered = loader["checkpoint"][1]["options"]
    assert checkpoint in offered and "gone.safetensors" not in offered
    assert not [name for name in offered if name.startswith("circle")]
    graph = {"model": node("QDiffLoadModel", checkpoint=checkpoint, dtype="auto", kernels="auto")}
    result = server.run(graph | {"info": node("QDiffModelInfo", model=["model", 0])})
    assert result["error"] is None and "Flux" in result["outputs"]["info"]["text"][0]


@pytest.mark.parametrize("kind", ["QDiffModelInfo", "QDiffReport"])
def test_what_is_not_quantized_is_said_to_be_so(kind, server):
    graph = {"dense": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"), "x": node(kind, model=["dense", 0])}
    assert "no layer that qdiff has quantized" in server.run(graph)["error"]
    graph["x"] = node("QDiffSaveModel", model=["dense", 0], name="made/never")
    assert "not quantized by qdiff" in server.run(graph)["error"]


def test_a_lora_is_not_lost_silently_when_a_model_is_saved(server):
    graph = {
        "model": node("QDiffLoadModel", checkpoint="flux", dtype="auto", kernels="auto"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name="flux.safetensors", strength_model=1.0),
        "save": node("QDiffSaveModel", model=["lora", 0], name="made/with-lora"),
    }
    assert "cannot be saved into it" in server.run(graph)["error"]
    assert not (server.base / "models" / "qdiff" / "made" / "with-lora").exists()


def test_a_stock_lora_loader_changes_the_image_and_lets_go(server):
    plain = pictures(server, server.run(sampling("flux")))[0]
    graph = sampling("flux", model=("lora", 0))
    graph["lora"] = node("LoraLoaderModelOnly", model=["model", 0], lora_name="flux.safetensors", strength_model=1.0)
    patched = pictures(server, server.run(graph))[0]
    graph = sampling("flux")
    graph["sample"]["inputs"]["denoise"] = 0.9999  # not the cached result
    again = pictures(server, server.run(graph))[0]
    assert np.abs(patched.astype(int) - plain).max() > 5
    assert np.abs(again.astype(int) - plain).max() <= 1


def test_quantize_save_load_compare_and_report_in_one_graph(server):
    graph = {
        "dense": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
        "quantized": node(
            "QDiffQuantizeModel",
            model=["dense", 0],
            method="svdquant",
            **{"method.bits": "4", "method.rank": 2, "method.activations": "none"},
            skip="norm_out",
            outer_layers=False,
            seed=0,
        ),
        "save": node("QDiffSaveModel", model=["quantized", 0], name="große Modelle/made here [4-bit] 模型"),
        "info": node("QDiffModelInfo", model=["quantized", 0]),
        "report": node("QDiffReport", model=["quantized", 0]),
        **around("flux"),
        "compare": node(
            "QDiffCompare",
            model_a=["dense", 0],
            model_b=["quantized", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            vae=["vae", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            view="all",
            gain=4.0,
        ),
    }
    result = server.run(graph)
    assert result["error"] is None, result["error"]
    report, comparison = (shown(server, result, name) for name in ("report", "compare"))
    assert report.shape == (640, 1200, 3) and comparison.shape == (64, 3 * 64 + 16, 3)
    assert "svdquant" in result["outputs"]["info"]["text"][0] and "PSNR" in result["outputs"]["compare"]["text"][0]
    loader = server.get("/object_info/QDiffLoadModel")["QDiffLoadModel"]["input"]["required"]
    assert "große Modelle/made here [4-bit] 模型" in loader["checkpoint"][1]["options"]
    again = sampling("flux") | {
        "model": node("QDiffLoadModel", checkpoint="große Modelle/made here [4-bit] 模型", dtype="auto", kernels="torch")
    }
    assert pictures(server, server.run(again))
    assert "exists already" in server.run(graph)["error"]


@pytest.mark.parametrize("method", ["as stored", "vq"])
def test_the_demo_pipeline_makes_images(method, server):
    options = {} if method == "as stored" else {"quantize.bits": "3", "quantize.activations": "none"}
    graph = {
        "pipe": node("QDiffLoadPipeline", pipeline="demo model (bundled)", quantize=method, **options),
        "images": node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="Trouser, 9", seed=0, steps=4, guidance=2.0, images=2),
        "save": node("SaveImage", images=["images", 0], filename_prefix="demo"),
    }
    images = pictures(server, server.run(graph))
    assert len(images) == 2 and all(image.std() > 20 for image in images)


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ("nowhere", "There is no quantized model 'nowhere'"),
        ("other.safetensors", "is no qdiff checkpoint"),
        ("text.safetensors", "safetensors"),
        ("truncated", "is truncated or damaged"),
        ("future", "format version 99"),
        ("incomplete", "lacks tensor transformer_blocks.9.attn.to_q.codes"),
        ("dit", "DiTTransformer2DModel, which ComfyUI has no native class for"),
        ("text/t5", "is the text encoder T5EncoderModel; load it with Load Quantized CLIP"),
        ("gone.safetensors", "There is no quantized model 'gone.safetensors'"),
    ],
)
def test_a_bad_checkpoint_is_refused_before_anything_runs(checkpoint, message, server):
    result = server.run(sampling("flux") | {"model": node("QDiffLoadModel", checkpoint=checkpoint, dtype="auto", kernels="auto")})
    assert message in result["error"]
    assert server.process.poll() is None


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model": node("QDiffLoadModel", checkpoint="flux", dtype="auto", kernels="triton")},
            "kernels: 'triton' not in ['auto', ",
        ),
        *(
            ({"info": node("QDiffSaveModel", model=["model", 0], name=name)}, "must be a folder inside models/qdiff")
            for name in (
                "../outside",
                "/absolute",
                "a/../b",
                "a//b",
                "a/",
                "",
                ".hidden",
                "a/.hidden",
                "ends with a dot.",
                "con:",
                "a\\b",
            )
        ),
        ({"info": node("QDiffSaveModel", model=["model", 0], name="模" * 70)}, "name is too long for a folder"),
        ({"info": node("QDiffSaveModel", model=["model", 0], name="flux/inside")}, "flux is a model itself"),
        ({"info": node("QDiffSaveModel", model=["model", 0], name="flux")}, "flux exists already"),
        ({"pipe": node("QDiffLoadPipeline", pipeline="nothing", quantize="as stored")}, "There is no pipeline 'nothing'"),
        (
            {"clip": node("QDiffLoadCLIP", encoder="x", encoder_2="none", encoder_3="none", type="flux")},
            "There is no text encoder 'x'",
        ),
        (
            {"clip": node("QDiffLoadCLIP", encoder="flux", encoder_2="none", encoder_3="none", type="flux")},
            "flux is no text encoder but a FluxTransformer2DModel; load it with Load Quantized Model",
        ),
    ],
)
def test_a_bad_choice_is_refused_with_a_way_out(change, message, server):
    graph = sampling("flux") | change
    if "pipe" in change:
        graph["images"] = node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="0", seed=0, steps=1, guidance=1.0, images=1)
        graph["show"] = node("SaveImage", images=["images", 0], filename_prefix="x")
    assert message in server.run(graph)["error"]
    assert server.process.poll() is None


@pytest.mark.parametrize("method", ["rtn", "svdquant", "aq"])
def test_a_checkpoint_that_is_replaced_under_its_name_gives_the_new_image(method, server, quantized):
    """Also by one of the same size and with the same time."""
    outer = {"keep_outer_layers": False, "modules_to_not_convert": ["transformer_blocks"]}
    target = server.base / "models" / "qdiff" / f"replaced {method}"
    shutil.copytree(quantized("flux", METHODS[method](**outer)), target)
    graph = sampling("flux") | {"model": node("QDiffLoadModel", checkpoint=target.name, dtype="auto", kernels="auto")}
    before = pictures(server, server.run(graph))[0]
    file = next(target.glob("*.safetensors"))
    with safe_open(file, framework="pt") as content:
        metadata, tensors = content.metadata(), {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    tensors["proj_out.bias"] += 1
    old = file.stat()
    file.unlink()
    save_file(tensors, file, metadata)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert file.stat().st_size == old.st_size
    assert np.abs(pictures(server, server.run(graph))[0].astype(int) - before).max() > 5


@pytest.mark.parametrize(
    "kind, changed, marked",
    [
        ("QDiffLoadModel", {"checkpoint": "truncated"}, ["checkpoint"]),
        ("QDiffLoadModel", {"checkpoint": "nowhere"}, ["checkpoint"]),
        ("QDiffLoadModel", {"kernels": "triton"}, ["kernels"]),
        ("QDiffLoadModel", {"checkpoint": "nowhere", "dtype": "int3"}, ["checkpoint", "dtype"]),
        ("QDiffLoadCLIP", {"encoder": "flux"}, ["encoder"]),
        ("QDiffLoadCLIP", {"encoder_2": "nowhere"}, ["encoder_2"]),
        ("QDiffLoadPipeline", {"pipeline": "nothing"}, ["pipeline"]),
        ("QDiffSaveModel", {"name": "../x"}, ["name"]),
    ],
)
def test_only_the_input_that_is_wrong_is_marked(kind, changed, marked, server):
    inputs = {
        "QDiffLoadModel": {"checkpoint": "flux", "dtype": "auto", "kernels": "auto"},
        "QDiffLoadCLIP": {"encoder": "text/clip_l", "encoder_2": "none", "encoder_3": "none", "type": "flux"},
        "QDiffLoadPipeline": {"pipeline": "demo model (bundled)", "quantize": "as stored"},
        "QDiffSaveModel": {"model": ["model", 0], "name": "made/marked"},
    }[kind]
    graph = {
        "model": node("QDiffLoadModel", checkpoint="flux", dtype="auto", kernels="auto"),
        "bad": node(kind, **inputs | changed),
    }
    if kind != "QDiffSaveModel":
        graph["show"] = node("PreviewAny", source=["bad", 0])
    answer = server.queue(graph)
    errors = answer["node_errors"]["bad"]["errors"]
    assert sorted(error["extra_info"]["input_name"] for error in errors) == marked
    assert list(answer["node_errors"]) == ["bad"]


@pytest.mark.parametrize("bad, message", [("flux", "flux is no text encoder"), ("text/broken", "is truncated or damaged")])
def test_a_bad_second_encoder_is_refused_before_anything_is_loaded(bad, message, server):
    good, broken = (server.base / "models" / "qdiff" / "text" / name for name in ("clip_l", "broken"))
    if not broken.exists():
        shutil.copytree(good, broken)
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
    graph = {
        "clip": node("QDiffLoadCLIP", encoder="text/clip_l", encoder_2=bad, encoder_3="none", type="flux"),
        "show": node("PreviewAny", source=["clip", 0]),
    }
    assert message in server.run(graph)["error"]


def test_an_unknown_class_and_a_second_quantization_are_readable_errors(server):
    graph = {
        "pipe": node("QDiffLoadPipeline", pipeline="demo model (bundled)", quantize="as stored"),
        "images": node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="dragon", seed=0, steps=1, guidance=1.0, images=1),
        "show": node("SaveImage", images=["images", 0], filename_prefix="x"),
    }
    assert "knows no class 'dragon'" in server.run(graph)["error"]
    twice = node("QDiffQuantizeModel", model=["model", 0], method="rtn", skip="", outer_layers=False, seed=0)
    twice["inputs"] |= {"method.bits": "4", "method.activations": "none"}
    graph = {"model": sampling("flux")["model"], "twice": twice, "info": node("QDiffModelInfo", model=["twice", 0])}
    assert "quantized already" in server.run(graph)["error"]
