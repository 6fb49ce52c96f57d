"""The nodes ``Quantized Model Info``, ``Quantization Report`` and ``Compare``."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..package import require


class ModelInfo(io.ComfyNode):
    """The node that lists the packed layers of a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffModelInfo",
            display_name="Quantized Model Info (qdiff)",
            category="qdiff",
            description="Lists what a quantized MODEL stores: kinds of layers, formats, bits, sizes and errors.",
            search_aliases=["inspect", "size", "bits per weight"],
            inputs=[io.Model.Input("model")],
            outputs=[io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        require()
        from ..report import describe

        text = describe(model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class Report(io.ComfyNode):
    """The node that plots the errors of the layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffReport",
            display_name="Quantization Report (qdiff)",
            category="qdiff",
            description="Plots the error of each layer of a quantized MODEL.",
            search_aliases=["error", "plot", "quality"],
            inputs=[io.Model.Input("model")],
            outputs=[io.Image.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        require()
        from ..plots import error_plot
        from ..report import to_tensor

        image = to_tensor(error_plot(model))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class Compare(io.ComfyNode):
    """The node that compares two models at the same seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        import comfy.samplers

        return io.Schema(
            node_id="QDiffCompare",
            display_name="Compare (qdiff)",
            category="qdiff",
            description="Samples two MODELs from the same noise and shows the images beside each other with their difference, "
            "PSNR and SSIM. Connect the outputs a and b to Compare Images for a slider.",
            search_aliases=["side by side", "difference", "psnr", "ssim", "a/b"],
            inputs=[
                io.Model.Input("model_a", tooltip="First model, for example the unquantized one."),
                io.Model.Input("model_b", tooltip="Second model, for example the quantized one."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae"),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
                io.Combo.Input(
                    "view", options=["all", "side by side", "difference"], tooltip="Parts of the comparison that the picture shows."
                ),
                io.Float.Input(
                    "gain", default=4.0, min=1.0, max=64.0, step=0.5, tooltip="Factor by which differences are shown brighter."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="comparison"),
                io.Image.Output(display_name="a"),
                io.Image.Output(display_name="b"),
                io.String.Output(display_name="similarity"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model_a: Any,
        model_b: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        vae: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        view: str,
        gain: float,
    ) -> io.NodeOutput:
        require()
        import comfy.utils

        from ..report import compare_images, similarity
        from ..sampling import sample_latent

        bar = comfy.utils.ProgressBar(2 * steps)

        def sample(model: Any) -> Any:
            settings = (seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image)
            images = vae.decode(sample_latent(model, *settings, on_step=lambda: bar.update(1)))
            return images.reshape(-1, *images.shape[-3:]).cpu()  # frames of a video one by one

        a, b = sample(model_a), sample(model_b)
        picture, text = compare_images(a, b, view, gain), similarity(a, b)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(picture, a, b, text, ui=shown)
