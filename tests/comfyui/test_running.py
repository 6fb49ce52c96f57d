"""What a user sees and does while the server works: previews, cancelling, running again, queueing."""

from __future__ import annotations

import numpy as np
from comfyui import host
from comfyui.server import node


def quantizing(method, model="flux", **options):
    chosen = {f"method.{key}": value for key, value in {"activations": "none", **options}.items()}
    return {
        "dense": node("UNETLoader", unet_name=f"{model}.safetensors", weight_dtype="default"),
        "packed": node("QDiffQuantizeModel", model=["dense", 0], method=method, **chosen, skip="", outer_layers=False, seed=0),
        "info": node("QDiffModelInfo", model=["packed", 0]),
    }


def of(kind, messages):
    return [message for message in messages if message.kind == kind]


def table(result):
    assert result["error"] is None, result["error"]
    return result["outputs"]["info"]["text"][0]


def test_a_growing_plot_is_shown_while_a_model_is_quantized(server):
    messages = server.watch(quantizing("rtn", bits="4"))
    assert messages[-1].kind == "execution_success"
    shown = of("preview", messages)
    assert len(shown) >= 2  # after the first layer and after the last
    assert {message.data["node_id"] for message in shown} == {"packed"}
    assert all(message.picture.size == host.part("plots").SMALL for message in shown)
    first, last = (np.asarray(message.picture.convert("L")) for message in (shown[0], shown[-1]))
    right = slice(first.shape[1] * 3 // 4, None)  # where the last layers are drawn, below the words and between the lines
    assert (first[70:, right] < 200).sum() == 0 < (last[70:, right] < 200).sum()


def test_a_pipeline_shows_every_step(server):
    graph = {
        "pipe": node("QDiffLoadPipeline", pipeline="demo model (bundled)", quantize="as stored"),
        "images": node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="0", seed=0, steps=3, guidance=1.0, images=1),
        "save": node("SaveImage", images=["images", 0], filename_prefix="previewed"),
    }
    shown = of("preview", server.watch(graph))
    assert [message.data["node_id"] for message in shown] == ["images"] * 3
    pictures = [np.asarray(message.picture) for message in shown]
    assert not np.array_equal(pictures[0], pictures[2])


def test_no_preview_is_drawn_where_the_user_wants_none(server):
    messages = server.watch(quantizing("rtn", bits="5"), preview_method="none")
    assert messages[-1].kind == "execution_success"
    assert not of("preview", messages)
    assert of("progress", messages)[-1].data["value"] == of("progress", messages)[-1].data["max"] > 10


def test_a_cancelled_quantization_can_be_run_again(server):
    graph = quantizing("aq", bits="2", effort=1)
    messages = server.watch(graph, at=lambda message: message.kind == "preview" and server.post("/interrupt", {}))
    assert messages[-1].kind == "execution_interrupted"
    done = of("progress", messages)[-1].data
    assert done["value"] < done["max"]
    assert "aq: " in table(server.run(graph))


def test_methods_are_switched_from_run_to_run(server):
    methods = {"vq": {"bits": "3"}, "fp": {"format": "nvfp4"}, "rtn": {"bits": "2"}}
    runs = [(name, table(server.run(quantizing(name, **methods[name])))) for name in ("vq", "fp", "rtn", "vq")]
    assert all(f", {name}: " in text for name, text in runs)
    assert runs[0] == runs[3] and len(set(runs)) == 3


def test_queued_prompts_get_their_own_results(server):
    graphs = [quantizing("rtn", bits="3"), quantizing("rtn", bits="6"), quantizing("svdquant", model="sdxl", bits="4", rank=2)]
    queued = [server.queue(graph)["prompt_id"] for graph in graphs]
    tables = [table(server.result(prompt)) for prompt in queued]
    bits = [float(text.split(" bits per weight")[0].split()[-1]) for text in tables]
    assert bits[0] < 4 < 6 < bits[1] and tables[2].startswith("SDXL, svdquant")


def test_of_two_prompts_that_save_under_one_name_the_first_wins(server):
    name = "made/once"
    graphs = [quantizing("rtn", bits=bits) | {"save": node("QDiffSaveModel", model=["packed", 0], name=name)} for bits in "48"]
    first, second = [server.result(prompt) for prompt in [server.queue(graph)["prompt_id"] for graph in graphs]]
    assert first["error"] is None and "exists already" in second["error"]
    graph = {"model": node("QDiffLoadModel", checkpoint=name, dtype="auto", kernels="auto")}
    assert table(server.run(graph | {"info": node("QDiffModelInfo", model=["model", 0])})) == first["outputs"]["info"]["text"][0]
