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


def test_no_preview_is_drawn_where_the_user_wants_none(server):
    messages = server.watch(quantizing("rtn", bits="5"), preview_method="none")
    assert messages[-1].kind == "execution_success"
    assert not of("preview", messages)
    assert of("progress", messages)[-1].data["value"] == of("progress", messages)[-1].data["max"] > 10
