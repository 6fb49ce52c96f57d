"""Paired images of any pipeline, the denoiser's errors at fixed inputs, and the bundled models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline, UNet2DModel

from qdiff_diffusers.evaluation import peers, sample
from qdiff_diffusers.evaluation.build import load
from qdiff_diffusers.evaluation.probes import Probes, layer_errors, record, step_errors
from qdiff_diffusers.evaluation.subject import BUNDLED, find_subject


class TestSamplingOfAnyPipeline:
    def test_prompts_and_other_arguments_reach_the_pipeline(self):
        asked = []

        class Fake:
            transformer = torch.nn.Identity()

            def set_progress_bar_config(self, **kwargs):
                pass

            def __call__(self, prompt, generator, output_type, height):
                asked.append((prompt, height, len(generator)))
                return SimpleNamespace(images=torch.rand(len(prompt), 4, 4, 3).numpy())

        images = sample(Fake(), ["a", "b", "c"], range(3), steps=None, guidance_scale=None, batch_size=2, height=4)
        assert asked == [(["a", "b"], 4, 2), (["c"], 4, 1)] and images.shape == (3, 3, 4, 4)

    def test_frames_of_a_video_stand_below_one_another(self):
        frames = torch.rand(2, 3, 4, 5, 3)
        pipe = SimpleNamespace(transformer=torch.nn.Identity(), set_progress_bar_config=lambda **_: None)
        call = type("Fake", (), {"__call__": lambda self, **_: SimpleNamespace(frames=frames.numpy()), **vars(pipe)})()
        call.set_progress_bar_config = lambda **_: None
        images = sample(call, None, [0, 1], steps=None, guidance_scale=None)
        assert images.shape == (2, 3, 12, 5) and torch.equal(images[1, :, 4:8], frames[1, 1].permute(2, 0, 1))


class TestProbes:
    def test_survive_a_file_and_are_exact_for_the_model_itself(self, by_class, tmp_path):
        pipe = DiTPipeline.from_pretrained(by_class)
        probes = record(pipe, lambda: sample(pipe, [1, 2], [0, 1], steps=3, guidance_scale=1.0))
        probes.save(tmp_path / "p.pt")
        again = Probes.load(tmp_path / "p.pt")
        assert step_errors(pipe, again) == [(666.0, 0.0), (333.0, 0.0), (0.0, 0.0)]
        assert set(layer_errors(pipe, again).values()) == {0.0}

    def test_an_error_of_one_layer_shows_at_that_layer_only(self, by_class):
        pipe = DiTPipeline.from_pretrained(by_class)
        probes = record(pipe, lambda: sample(pipe, [1, 2], [0, 1], steps=2, guidance_scale=1.0))
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].attn1.to_q.weight *= 1.5
        wrong = {name for name, error in layer_errors(pipe, probes).items() if error > 1e-6}
        assert wrong == {"transformer.transformer_blocks.0.attn1.to_q"}
        assert all(error > 0 for _, error in step_errors(pipe, probes))


class TestBundledModels:
    @pytest.mark.parametrize(("name", "megabytes"), [("dit", 21), ("unet", 12)])
    def test_are_small_say_how_they_were_made_and_are_judged(self, name, megabytes):
        files = [path for path in BUNDLED[name].rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < megabytes * 1e6
        assert BUNDLED[name] / "README.md" in files
        subject = find_subject(name)
        assert subject.labels == tuple(range(10)) and (subject.steps, subject.guidance_scale) == (20, 2.0)
        assert subject.stored_dtype == torch.float16 and (subject.classifier / "features.safetensors").is_file()

    def test_the_unet_is_convolutional_with_attention_at_two_resolutions(self):
        model = UNet2DModel.from_pretrained(BUNDLED["unet"], subfolder="transformer")
        kinds = [type(layer) for layer in peers.target_layers(model).values()]
        assert kinds.count(torch.nn.Conv2d) > 20 and torch.nn.Linear in kinds
        assert sum("Attn" in block for block in model.config.down_block_types) == 2

    def test_the_unet_draws_what_it_is_asked_for(self):
        pipe = load(BUNDLED["unet"], torch.float32)
        boots, trousers = sample(pipe, [9] * 2 + [1] * 2, range(4), steps=8).split(2)
        assert boots.shape == (2, 1, 32, 32)
        # A boot is wide and low, trousers are narrow and tall.
        assert boots[..., 18:28, 3:29].mean() > trousers[..., 18:28, 3:29].mean()
        assert trousers[..., 4:8, 10:22].mean() > boots[..., 4:8, 10:22].mean()
