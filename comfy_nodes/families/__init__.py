"""The model families that ComfyUI runs natively, each with the table of its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import image, video
from .rules import MissingPart, Part, Rule, Shape, Slice, matches, parse, to_diffusers, to_native
from .unet import unet_table

__all__ = [
    "FAMILIES",
    "Companion",
    "Family",
    "MissingPart",
    "Part",
    "Shape",
    "Slice",
    "family_of_class",
    "family_of_native",
    "in_companion",
    "to_diffusers",
    "to_native",
]


Settings = Mapping[str, Any]  # diffusers' config.json


class Companion(NamedTuple):
    """A component of diffusers' pipeline that ComfyUI's model contains, in a folder beside the model's.

    Attributes:
        folder: name of the folder.
        table: see rules.py. What is in no line of it is no part of ComfyUI's model.
        required: whether the model cannot do without it.
    """

    folder: str
    table: str
    required: bool = True

    def rules(self, keys: Iterable[str]) -> list[Rule]:
        """The rules for a component with these tensors."""
        return parse(self.table)

    def computed(self, settings: Settings) -> dict[str, Tensor]:
        """Nothing of a component is computed."""
        return {}


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: name of the family in messages.
        classes: names of diffusers' model classes.
        native: names of ComfyUI's model classes (``comfy.model_base``), to notice a model taken for another one.
        table: see rules.py; or a function of the tensors' names that makes it.
        unused: ComfyUI's tensors that only training reads; diffusers does not have them.
        measured: ComfyUI's modules by the shapes of whose weights it tells what model it has, in the notation of the tables. A
            format that packs several numbers into one, or pads, would mislead it.
        computed: ComfyUI's tensors that diffusers computes instead of storing, from diffusers' settings of the model.
        told: what ComfyUI reads from its own files' metadata and cannot tell from the tensors, from diffusers' settings; those of
            the companions are under the names of their folders.
        beside: other components of diffusers' pipeline that ComfyUI's model contains.
    """

    name: str
    classes: tuple[str, ...]
    native: tuple[str, ...]
    table: str | Callable[[Iterable[str]], str] = ""
    unused: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    computed: Callable[[Settings], dict[str, Tensor]] = lambda settings: {}
    told: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    beside: tuple[Companion, ...] = ()

    def rules(self, keys: Iterable[str]) -> list[Rule]:
        """The rules for a model with these tensors, named as either program names them."""
        return parse(self.table if isinstance(self.table, str) else self.table(keys))

    def is_measured(self, key: str) -> bool:
        """Whether the shape of ComfyUI's tensor ``key`` tells it what model it has."""
        return any(matches(name, key) for name in self.measured)


# ComfyUI tells these apart by the number of input channels, or by what else the model is conditioned on.
UNETS = (
    "BaseModel",
    "SDXL",
    "SDXLRefiner",
    "SD21UNCLIP",
    "SD15_instructpix2pix",
    "SDXL_instructpix2pix",
    "SD_X4Upscaler",
    "Lotus",
)
MEASURED_UNET = ("label_emb.0.0", "input_blocks.N.1.transformer_blocks.0.attn2.to_k")
MEASURED_WAN = ("blocks.0.ffn.0", "head.head")
MEASURED_HUNYUAN_VIDEO = ("txt_in.input_embedder", "final_layer.linear")
HUNYUAN_VIDEOS = ("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V")
HUNYUAN_VIDEOS_15 = ("HunyuanVideo15", "HunyuanVideo15_SR_Distilled")

FAMILIES = (
    Family("Flux.1", ("FluxTransformer2DModel",), ("Flux",), image.FLUX, (), ("vector_in.in_layer", "txt_in", "img_in")),
    Family("Flux.2", ("Flux2Transformer2DModel",), ("Flux2",), image.FLUX2, (), ("txt_in", "img_in")),
    Family("Chroma", ("ChromaTransformer2DModel",), ("Chroma",), image.CHROMA, (), ("txt_in",)),
    Family(
        "Stable Diffusion 3",
        ("SD3Transformer2DModel",),
        ("SD3",),
        image.SD3,
        (),
        ("y_embedder.mlp.0", "context_embedder", "final_layer.linear"),
    ),
    Family("Stable Diffusion UNet", ("UNet2DConditionModel",), UNETS, unet_table, (), MEASURED_UNET),
    Family("PixArt", ("PixArtTransformer2DModel",), ("PixArt",), image.PIXART, ("y_embedder.y_embedding",)),
    Family("AuraFlow", ("AuraFlowTransformer2DModel",), ("AuraFlow",), image.AURAFLOW, (), ("cond_seq_linear",)),
    Family("Lumina 2", ("Lumina2Transformer2DModel",), ("Lumina2",), image.LUMINA2, (), ("cap_embedder.1",)),
    Family("Z-Image", ("ZImageTransformer2DModel",), ("Lumina2", "ZImage"), image.Z_IMAGE, (), ("cap_embedder.1",)),
    Family("Qwen-Image", ("QwenImageTransformer2DModel",), ("QwenImage",), "", (), ("img_in",)),
    Family("HiDream", ("HiDreamImageTransformer2DModel",), ("HiDream",)),
    Family("Wan", ("WanTransformer3DModel",), ("WAN21", "WAN22"), video.WAN, (), MEASURED_WAN),
    Family("LTX-Video", ("LTXVideoTransformer3DModel",), ("LTXV",), video.LTX, (), ("transformer_blocks.0.attn2.to_k",)),
    Family("HunyuanVideo", ("HunyuanVideoTransformer3DModel",), HUNYUAN_VIDEOS, video.HUNYUAN_VIDEO, (), MEASURED_HUNYUAN_VIDEO),
    Family("Mochi", ("MochiTransformer3DModel",), ("GenmoMochi",), video.MOCHI),
    Family("Krea 2", ("Krea2Transformer2DModel",), ("Krea2",), image.KREA2),
    Family("Ideogram 4", ("Ideogram4Transformer2DModel",), ("Ideogram4",), image.IDEOGRAM4),
    Family("ERNIE-Image", ("ErnieImageTransformer2DModel",), ("ErnieImage",)),
    Family("LongCat-Image", ("LongCatImageTransformer2DModel",), ("LongCatImage",), image.LONGCAT),
    Family("JoyImage", ("JoyImageEditTransformer3DModel",), ("JoyImage",)),
    Family("HunyuanImage 2.1", ("HunyuanImageTransformer2DModel",), ("HunyuanImage21",), video.HUNYUAN_IMAGE),
    Family("HunyuanVideo 1.5", ("HunyuanVideo15Transformer3DModel",), HUNYUAN_VIDEOS_15, video.HUNYUAN_VIDEO_15),
    Family("Kandinsky 5", ("Kandinsky5Transformer3DModel",), ("Kandinsky5", "Kandinsky5Image")),
    Family(
        "Cosmos-Predict2",
        ("CosmosTransformer3DModel",),
        ("CosmosPredict2", "Anima"),
        video.COSMOS2,
        beside=(Companion("text_conditioner", video.ANIMA_ADAPTER, required=False),),
    ),
    Family(
        "LTX-2",
        ("LTX2VideoTransformer3DModel",),
        ("LTXAV",),
        video.LTX2,
        told=video.ltx2_told,
        beside=(Companion("connectors", video.LTX2_CONNECTORS),),
    ),
    Family("CogVideoX", ("CogVideoXTransformer3DModel",), ("CogVideoX",), video.COGVIDEOX),
    Family(
        "Wan Animate",
        ("WanAnimateTransformer3DModel",),
        ("WAN22_Animate",),
        video.WAN_ANIMATE,
        computed=video.wan_animate_filters,
    ),
    Family("Wan VACE", ("WanVACETransformer3DModel",), ("WAN21_Vace",), video.WAN_VACE),
    Family(
        "MiniMax-H3",
        ("MiniMaxH3Transformer3DModel",),
        ("MiniMaxH3",),
        video.MINIMAX_H3,
        computed=video.minimax_h3_frequencies,
    ),
)


def in_companion(family: Family | None, name: str) -> bool:
    """Whether one of ComfyUI's modules belongs to another component in diffusers."""
    rules = [rule for companion in (family.beside if family else ()) for rule in companion.rules([])]
    return name.partition(".")[0] in {rule.native.partition(".")[0] for rule in rules}


def family_of_class(name: str) -> Family | None:
    """The family of a diffusers class."""
    return next((family for family in FAMILIES if name in family.classes), None)


def family_of_native(name: str, keys: Iterable[str]) -> Family | None:
    """The family of one of ComfyUI's model classes; ``keys`` tell families apart that share a class."""
    keys = set(keys)
    if name == "Lumina2" and any(key.startswith("x_pad_token") for key in keys):
        name = "ZImage"
    candidates = [family for family in FAMILIES if name in family.native]
    return candidates[-1] if name == "ZImage" else next(iter(candidates), None)
