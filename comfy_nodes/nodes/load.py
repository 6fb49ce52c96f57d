"""The node ``Load Quantized Model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..folders import OURS, checkpoints, fingerprint
from ..package import problem, require

MODELS = (OURS, "diffusion_models")
DTYPES = ["auto", "bfloat16", "float16", "float32"]
KERNELS = ("auto", "triton", "torch")


def kernel_choices() -> list[str]:
    """Kernels that can be chosen on this machine."""
    return [name for name in KERNELS if _kernel_problem(name) is None]


class LoadModel(io.ComfyNode):
    """The node that loads a quantized checkpoint as a native MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffLoadModel",
            display_name="Load Quantized Model (qdiff)",
            category="qdiff",
            description="Loads a diffusion model that qdiff has quantized, as an ordinary MODEL: samplers, LoRAs, ControlNets and "
            "memory management work as with any other.",
            search_aliases=["quantized", "low bit", "svdquant", "aqlm", "vq", "nvfp4", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list(checkpoints(*MODELS)),
                    tooltip="Quantized model in models/qdiff or models/diffusion_models: a file, or a folder that diffusers saved.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    advanced=True,
                    tooltip="Data type of the layers that are not quantized, and of computing. auto: the checkpoint's.",
                ),
                io.Combo.Input(
                    "kernels",
                    options=kernel_choices(),
                    default="auto",
                    advanced=True,
                    tooltip="Kernels that multiply packed weights. auto: the fastest on this machine. triton: GPU only. torch: "
                    "the slow reference.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        """Check the checkpoint only: ComfyUI marks every input that is named here, and checks the others against their options."""
        return problem() or checkpoint is None or _problem_of(checkpoint, MODELS)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **kwargs: Any) -> str:
        """``checkpoint`` is ``None`` where another node makes the name, which is not known yet."""
        found = checkpoints(*MODELS)
        return fingerprint(*(found.values() if checkpoint is None else filter(None, [found.get(checkpoint)])))

    @classmethod
    def execute(cls, checkpoint: str, dtype: str = "auto", kernels: str = "auto") -> io.NodeOutput:
        require()
        if reason := _kernel_problem(kernels):
            raise ValueError(reason)
        import torch

        from ..loader import load_model

        model = load_model(_path(checkpoint, MODELS), None if dtype == "auto" else getattr(torch, dtype))
        if kernels != "auto":
            from ..ops import force_kernels

            force_kernels(model.model, kernels)
        return io.NodeOutput(model)


def _path(checkpoint: str, kinds: tuple[str, ...]) -> Path:
    path = checkpoints(*kinds).get(checkpoint)
    if path is None:
        raise FileNotFoundError(_not_found(checkpoint, kinds))
    return path


def _not_found(checkpoint: str, kinds: tuple[str, ...]) -> str:
    import folder_paths

    folders = ", ".join(path for kind in kinds for path in folder_paths.get_folder_paths(kind))
    return f"There is no quantized model {checkpoint!r} in {folders}"


def _problem_of(checkpoint: str, kinds: tuple[str, ...]) -> bool | str:
    """What is wrong with a checkpoint's description, before anything is loaded; ``True`` if nothing is."""
    from qdiff_diffusers.checkpoint.stored_model import read_stored_model

    from ..loader import stored_family

    path = checkpoints(*kinds).get(checkpoint)
    if path is None:
        return _not_found(checkpoint, kinds)
    try:
        stored_family(read_stored_model(path))
    except (ValueError, OSError) as error:
        return str(error)
    return True


def _kernel_problem(kernels: str) -> str | None:
    if kernels not in KERNELS:
        return f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}"
    import comfy.model_management

    if kernels == "triton" and comfy.model_management.get_torch_device().type == "cpu":
        return "kernels: triton needs a GPU, and ComfyUI computes on the CPU here; choose auto"
    return None
