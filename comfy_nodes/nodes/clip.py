"""``Load Quantized CLIP``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..folders import OURS, checkpoints, fingerprint
from ..package import problem, require

ENCODERS = (OURS, "text_encoders")
NONE = "none"


def clip_types() -> list[str]:
    """The types that this ComfyUI knows, the most used first."""
    import comfy.sd

    names = ["sdxl", *(name.lower() for name in comfy.sd.CLIPType.__members__)]
    first = ["flux", "sd3", "sdxl", "qwen_image", "wan", "stable_diffusion"]
    return [name for name in first if name in names] + sorted(set(names) - set(first))


def encoders() -> dict[str, Path]:
    """Quantized text encoders, then the others in models/text_encoders."""
    names = folder_paths.get_filename_list("text_encoders")
    dense = {name: Path(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in names}
    return checkpoints(*ENCODERS) | dense


class LoadCLIP(io.ComfyNode):
    """A native CLIP from quantized text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = "For models with more than one text encoder. May be an ordinary file in models/text_encoders too."
        more = [NONE, *encoders()]
        return io.Schema(
            node_id="QDiffLoadCLIP",
            display_name="Load Quantized CLIP (qdiff)",
            category="qdiff",
            description="Loads text encoders that qdiff has quantized (T5, CLIP, Qwen), as an ordinary CLIP.",
            search_aliases=["text encoder", "t5", "quantized clip", "qwen"],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=list(checkpoints(*ENCODERS)),
                    tooltip="Quantized text encoders in models/qdiff and models/text_encoders.",
                ),
                io.Combo.Input("encoder_2", options=more, default=NONE, tooltip=tip),
                io.Combo.Input("encoder_3", options=more, default=NONE, tooltip=tip),
                io.Combo.Input("type", options=clip_types(), tooltip="The model that the text is for."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool | str:
        """ComfyUI marks every input that is named here, so there is one; what is in the other files is looked at when loading."""
        if (reason := problem()) or encoder is None:
            return reason or True
        from ..clip import read_encoder

        if (path := encoders().get(encoder)) is None:
            return f"There is no text encoder {encoder!r} in models/qdiff or models/text_encoders"
        try:
            read_encoder(path)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, encoder: str | None = None, encoder_2: str = NONE, encoder_3: str = NONE, **kwargs: Any) -> str:
        """A file that brings the tokenizer may lie in a folder beside the encoder's."""
        found = encoders()
        paths = list(found.values()) if encoder is None else [found[n] for n in (encoder, encoder_2, encoder_3) if n in found]
        return fingerprint(*paths, *(place for path in paths for place in sorted(path.parent.glob("tokenizer*"))))

    @classmethod
    def execute(cls, encoder: str, type: str, encoder_2: str = NONE, encoder_3: str = NONE) -> io.NodeOutput:
        require()
        from ..clip import load_clip

        return io.NodeOutput(load_clip([encoders()[name] for name in (encoder, encoder_2, encoder_3) if name != NONE], type))
