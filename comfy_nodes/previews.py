"""Pictures that a node shows while it works, through ComfyUI's progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable

from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

SIZE = 512  # pixels, of the longer side
OPTION = "--preview-method"  # of ComfyUI's command line


def preview(draw: Callable[[], Image.Image | None]) -> tuple[str, Image.Image, int] | None:
    """A picture as ``ProgressBar.update_absolute`` takes it; ``None``, and nothing is drawn, if previews are switched off."""
    image = None if previews_are_off() else draw()
    return None if image is None else ("PNG", image, SIZE)


def previews_are_off() -> bool:
    """Whether the user switched previews off, in the frontend's settings for this prompt, or for all when ComfyUI was started.

    Without a choice ComfyUI shows none while it samples, as decoding them takes time; qdiff's take none.
    """
    chosen = _chosen_for_this_prompt()
    if chosen not in (None, "default"):
        return chosen == "none"
    return args.preview_method == LatentPreviewMethod.NoPreviews and any(option.startswith(OPTION) for option in sys.argv)


def _chosen_for_this_prompt() -> str | None:
    """The preview setting that the frontend sent with the running prompt; ``None`` outside of a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = list(server.prompt_queue.currently_running.values()) if server else []
    return running[0][3].get("preview_method") if running else None
