"""The nodes ``Load Pipeline`` and ``Sample Pipeline``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..folders import DEMO, fingerprint, pipelines
from ..package import problem, require
from .quantize import make_config, method_inputs

Pipeline = io.Custom("QDIFF_PIPELINE")


class LoadPipeline(io.ComfyNode):
    """The node that loads a diffusers pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        methods = [io.DynamicCombo.Option("as stored", []), *(io.DynamicCombo.Option(n, i) for n, i in method_inputs().items())]
        return io.Schema(
            node_id="QDiffLoadPipeline",
            display_name="Load Pipeline (qdiff)",
            category="qdiff/pipeline",
            description="Loads a whole diffusers pipeline, quantized or not, for models that ComfyUI has no class for: DiT, Sana. "
            "The bundled demo model needs no download.",
            search_aliases=["diffusers", "dit", "sana", "demo"],
            inputs=[
                io.Combo.Input(
                    "pipeline", options=[DEMO, *pipelines()], tooltip="Folder in models/qdiff or models/diffusers, or the demo."
                ),
                io.DynamicCombo.Input(
                    "quantize", options=methods, tooltip="Method that quantizes the transformer or UNet while it loads."
                ),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def validate_inputs(cls, pipeline: str | None = None, *, quantize: Any = None) -> bool | str:
        """Check the pipeline only. ComfyUI always passes ``quantize``; being keyword-only, it is not marked as wrong too."""
        if (reason := problem()) or pipeline is None:
            return reason or True
        if pipeline != DEMO and pipeline not in pipelines():
            return f"There is no pipeline {pipeline!r} in models/qdiff or models/diffusers"
        return True

    @classmethod
    def fingerprint_inputs(cls, pipeline: str | None = None, **kwargs: Any) -> str:
        found = pipelines()
        return fingerprint(*(found.values() if pipeline is None else filter(None, [found.get(pipeline)])))

    @classmethod
    def execute(cls, pipeline: str, quantize: dict[str, Any]) -> io.NodeOutput:
        require()
        from ..pipeline import load_pipeline

        chosen = quantize["quantize"]
        options = {"method": chosen} | {key: value for key, value in quantize.items() if key != "quantize"}
        config = None if chosen == "as stored" else make_config(options, "", False, 0)
        return io.NodeOutput(load_pipeline(pipeline, pipelines().get(pipeline), config))


class SamplePipeline(io.ComfyNode):
    """The node that draws images with a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffSamplePipeline",
            display_name="Sample Pipeline (qdiff)",
            category="qdiff/pipeline",
            description="Runs a pipeline: a prompt or classes in, images out, with previews at every step.",
            search_aliases=["generate", "class conditional", "dit"],
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input(
                    "prompt",
                    default="0, 1, 2, 3",
                    multiline=True,
                    tooltip="A text; for class-conditional models the names or numbers of classes, separated by commas.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the first image; each further image has the next number.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Number of denoising steps."),
                io.Float.Input(
                    "guidance", default=2.0, min=1.0, max=30.0, step=0.1, tooltip="Guidance scale; 1 switches guidance off."
                ),
                io.Int.Input("images", default=4, min=1, max=64, tooltip="Number of images; they go through the classes in turn."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, pipeline: Any, prompt: str, seed: int, steps: int, guidance: float, images: int) -> io.NodeOutput:
        require()
        import comfy.model_management
        import comfy.utils

        from ..pipeline import generate
        from ..previews import preview

        bar = comfy.utils.ProgressBar(steps)

        def on_step(done: int, picture: Callable[[], Any]) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, max(steps, done), preview(picture))

        result = generate(pipeline, prompt, seed=seed, steps=steps, guidance=guidance, images=images, on_step=on_step)
        return io.NodeOutput(result)
