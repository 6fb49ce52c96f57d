"""Pictures that a node shows while it works, through ComfyUI's progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

SIZE = 512  # pixels, of the longer side


def preview(draw: Callable[[], Image.Image | None]) -> tuple[str, Image.Image, int] | None:
    """A picture as ``ProgressBar.update_absolute`` takes it; ``None``, and nothing is drawn, if previews are switched off."""
    image = None if previews_are_off() else draw()
    return None if image is None else ("PNG", image, SIZE)


def previews_are_off() -> bool:
    """Whether the user chose to see none: for this prompt in the frontend's settings, or for all when ComfyUI was started.

    Without any choice ComfyUI shows none while it samples, as decoding them costs time there. Ours cost none.
    """
    none: Any = LatentPreviewMethod.NoPreviews
    chosen = latent_preview.default_preview_method != none or any(option.startswith("--preview-method") for option in sys.argv)
    return args.preview_method == none and chosen
