"""Lets a clone in ComfyUI's ``custom_nodes/`` be found as a node pack. It does nothing anywhere else."""

from __future__ import annotations

import importlib.util

# Test runners import this file too, under other names and without ComfyUI.
if __package__ and importlib.util.find_spec("comfy_api") and importlib.util.find_spec("comfy_api.latest"):
    from .comfy_nodes import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./comfy_nodes/web"
