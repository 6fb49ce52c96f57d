"""The node ``Load Quantized CLIP``."""

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
    """Text encoder types that this ComfyUI knows, the most used first."""
    import comfy.sd

    names = ["sdxl", *(name.lower() for name in comfy.sd.CLIPType.__members__)]
    first = ["flux", "sd3", "sdxl", "qwen_image", "wan", "stable_diffusion"]
    return [name for name in first if name in names] + sorted(set(names) - set(first))


def encoders() -> dict[str, Path]:
    """Text encoders by the names that the node shows: quantized ones, then the others in models/text_encoders."""
    names = folder_paths.get_filename_list("text_encoders")
    dense = {name: Path(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in names}
    return checkpoints(*ENCODERS) | dense


class LoadCLIP(io.ComfyNode):
    """The node that loads quantized text encoders as a native CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = "Further text encoder, for models with more than one. It may also be an ordinary file in models/text_encoders."
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
                    tooltip="Quantized text encoder in models/qdiff or models/text_encoders.",
                ),
                io.Combo.Input("encoder_2", options=more, default=NONE, tooltip=tip),
                io.Combo.Input("encoder_3", options=more, default=NONE, tooltip=tip),
                io.Combo.Input("type", options=clip_types(), tooltip="Model for which the text is encoded."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool | str:
        """Check the first encoder only: ComfyUI marks every input that is named here. Loading checks the others."""
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
        """Covers the tokenizer too, which may lie in a folder beside the encoder's."""
        found = encoders()
        paths = list(found.values()) if encoder is None else [found[n] for n in (encoder, encoder_2, encoder_3) if n in found]
        return fingerprint(*paths, *(place for path in paths for place in sorted(path.parent.glob("tokenizer*"))))

    @classmethod
    def execute(cls, encoder: str, type: str, encoder_2: str = NONE, encoder_3: str = NONE) -> io.NodeOutput:
        require()
        from ..clip import load_clip

        return io.NodeOutput(load_clip([encoders()[name] for name in (encoder, encoder_2, encoder_3) if name != NONE], type))
