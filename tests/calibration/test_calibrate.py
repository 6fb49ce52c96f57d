"""Calibration from end to end on tiny models: it lowers errors, resumes exactly, spreads over processes and saves what it made."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel

from qdiff_diffusers import (
    AQConfig,
    Calibration,
    CalibrationError,
    ConfigError,
    FPConfig,
    RTNConfig,
    SVDQuantConfig,
    Tuning,
    VQConfig,
    quantize,
)
from qdiff_diffusers.calibration import tuning as tuning_module
from qdiff_diffusers.calibration.store import Store
from qdiff_diffusers.calibration.trajectories import call_model, record
from qdiff_diffusers.calibration.tuning import guided_loss
from qdiff_diffusers.layers import PackedLayer
from qdiff_diffusers.model.bit_allocation import Choice, allocate_bits

CONFIG = AQConfig(num_codebooks=2, codebook_bits=4, vector_size=4, codebook="layer", keep_outer_layers=True)
FEW = {"class_labels": [0, 1], "samples": 4, "steps": 3, "batch_size": 2, "guidance_scale": 1.0}


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8
    )
    return DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler(), {0: "shirt", 1: "shoe"})


def unet(classes: int | None = 2) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=classes,
        attention_head_dim=8,
    )


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def output_error(pipe: DiTPipeline, exact: DiTPipeline | None = None) -> float:
    """On a trajectory that calibration has not seen."""
    exact, error, size = exact or dit(), 0.0, 0.0
    store = Store(Path("unused"), 1 << 30)
    record(exact, {"transformer": exact.transformer}, Calibration(**FEW, seed=7), {"transformer": store})
    for call in store:
        with torch.no_grad():
            found = call_model(pipe.transformer, call["inputs"])
        error += float((found - call["output"]).square().sum())
        size += float(call["output"].square().sum())
    return error / size


def test_calibrating_beats_quantizing_by_itself_and_is_saved_and_reloaded_exactly(tmp_path):
    dit().save_pretrained(tmp_path / "dense")
    plain = quantize(dit(), RTNConfig(bits=2))
    folder = quantize(tmp_path / "dense", RTNConfig(bits=2), tmp_path / "out", calibration=FEW, dtype=torch.float32)
    calibrated = quantize(dit(), RTNConfig(bits=2), calibration=FEW)
    assert output_error(calibrated) < 0.8 * output_error(plain)
    reloaded = DiTPipeline.from_pretrained(folder)
    assert_equal(tensors(reloaded.transformer), tensors(calibrated.transformer))
    log = json.loads((folder / "transformer" / "calibration.json").read_text())
    layers = [name for name, m in calibrated.transformer.named_modules() if isinstance(m, PackedLayer)]
    assert [entry["name"] for entry in log] == layers
    assert all(entry["output_errors"][-1] <= entry["output_errors"][0] for entry in log)
    assert reloaded.transformer.config.quantization_config.provenance["calibration"]["class_labels"] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]  # the workspace is gone


@pytest.mark.parametrize(
    ("config", "assignments"),
    [
        (FPConfig(bits=4), "candidates"),
        (VQConfig(bits=2), "rounding"),
        (AQConfig(bits=2), "rounding"),
        (AQConfig(bits=2), "candidates"),
    ],
)
def test_tuning_that_could_move_no_codes_is_refused_before_any_work(config, assignments):
    pipe = dit()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ConfigError, match=f'assignments="{assignments}" moves no codes of method {config.method_name}') as refused:
        quantize(pipe, config, calibration=Calibration(**FEW, tuning=Tuning(steps=2, assignments=assignments)))
    offered = str(refused.value).partition("choose one of ")[2].split(", ")
    assert offered == [name for name in ("pv", "candidates", "rounding", "fixed") if config.moves_by(name)]
    mixed = VQConfig(bits=2, overrides={"attn": FPConfig(bits=4)})
    quantize(dit(), mixed, calibration=Calibration(**FEW, hessian=False, tuning=Tuning(steps=1, assignments=assignments)))


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    first, second = (tensors(quantize(dit(), CONFIG, calibration=FEW).transformer) for _ in range(2))
    assert_equal(first, second)
    other = tensors(quantize(dit(), CONFIG, calibration=FEW | {"seed": 1}).transformer)
    assert any(not torch.equal(first[name], other[name]) for name in first)


TUNINGS = {
    "pv": (AQConfig(bits=2), {"assignments": "pv"}),
    "pv, own codebooks": (CONFIG, {"assignments": "pv"}),
    "fixed": (AQConfig(bits=2), {"assignments": "fixed"}),
    "candidates": (VQConfig(bits=2, codebook="layer"), {"assignments": "candidates", "candidates": 3, "code_lr": 0.1}),
    "candidates, codebooks after": (
        VQConfig(bits=2, codebook="layer"),
        {"assignments": "candidates", "codebooks": "after", "candidates": 2, "code_lr": 0.1},
    ),
    "scalar": (RTNConfig(bits=2), {"assignments": "pv"}),
    "rounding, integers": (RTNConfig(bits=2), {"assignments": "rounding", "code_lr": 0.05}),
    "rounding, two encodings": (FPConfig(bits=4), {"assignments": "rounding", "code_lr": 0.05}),
    "rounding, nvfp4": (FPConfig(weight_format="nvfp4"), {"assignments": "rounding", "code_lr": 0.05}),
    "low rank": (SVDQuantConfig(bits=2, rank=4, activations="int8"), {"assignments": "fixed"}),
}


@pytest.mark.parametrize("objective", ["model", "blocks"])
@pytest.mark.parametrize("name", TUNINGS)
def test_tuning_lowers_the_loss_and_what_is_saved_is_what_was_tuned(name, objective, tmp_path):
    config, settings = TUNINGS[name]
    steps = 150 if settings["assignments"] in ("candidates", "rounding") else 30
    calibration = Calibration(**FEW, hessian=False, tuning=Tuning(steps=steps, objective=objective, lr=3e-3, **settings))
    pipe = dit()
    folder = quantize(pipe, config, tmp_path / "out", calibration=calibration)
    log = json.loads((folder / "transformer" / "calibration.json").read_text())
    results = [entry for entry in log if entry["stage"] == "tuned"]
    assert len(results) == (1 if objective == "model" else len(pipe.transformer.transformer_blocks))
    assert all(result["kept"] and result["loss_after"] < 0.97 * result["loss_before"] for result in results)
    assert_equal(tensors(DiTPipeline.from_pretrained(folder).transformer), tensors(pipe.transformer))
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in pipe.transformer.parameters())


def test_tuning_that_would_make_it_worse_changes_nothing_and_says_so(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(tuning_module.logger, "warning", lambda text, *values: said.append(text % values))
    plain = quantize(dit(), RTNConfig(bits=4), calibration=FEW)
    worse = quantize(dit(), RTNConfig(bits=4), calibration=Calibration(**FEW, tuning=Tuning(steps=3, lr=1.0)))
    assert_equal(tensors(worse.transformer), tensors(plain.transformer))
    assert len(said) == 1 and "Tuning the model did not lower the loss" in said[0]


@pytest.mark.parametrize("objective", ["model", "blocks"])
@pytest.mark.parametrize("stop", ["layers", "tuning"])
def test_an_interrupted_run_resumes_with_identical_results(stop, objective, tmp_path, monkeypatch):
    calibration = Calibration(**FEW, tuning=Tuning(steps=12, objective=objective))
    monkeypatch.setattr(tuning_module, "SAVE_EVERY", 5)
    expected = quantize(dit(), AQConfig(bits=2), tmp_path / "whole", calibration=calibration)
    from qdiff_diffusers.calibration import layerwise

    target, name, after = (layerwise, "quantize_weight", 5) if stop == "layers" else (tuning_module.Tuner, "step", 8)
    original, calls = getattr(target, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, name, interrupted)
        quantize(dit(), AQConfig(bits=2), tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out-calibration" / "recorded").is_file()
    done = len(list((tmp_path / ".out-calibration").rglob("layers/*.safetensors")))
    calls.clear()
    monkeypatch.setattr(target, name, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    folder = quantize(dit(), AQConfig(bits=2), tmp_path / "out", calibration=calibration)
    if stop == "layers":
        assert done == 5
        assert len(calls) == len(json.loads((folder / "transformer/config.json").read_text())["quantization_config"]["layers"]) - 5
    else:
        assert len(calls) < 12 * (1 if objective == "model" else 2)
    a, b = (DiTPipeline.from_pretrained(f).transformer for f in (expected, folder))
    assert_equal(tensors(a), tensors(b))


SHARED = Calibration(**FEW, memory_limit=200_000, tuning=Tuning(steps=4, objective="blocks"))
WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from calibration.test_calibrate import CONFIG, SHARED, dit, tensors
from qdiff_diffusers import quantize
from qdiff_diffusers.calibration import parallel
from safetensors.torch import save_file
pipe = dit()
folder = quantize(pipe, CONFIG, {out!r} + "/model", calibration=SHARED)
assert (folder / "model_index.json").is_file()  # whichever process has written it
save_file({{k: v.contiguous() for k, v in tensors(pipe.transformer).items()}}, {out!r} + f"/{{parallel.rank()}}.safetensors")
"""


@pytest.mark.serial
def test_two_processes_give_bit_for_bit_the_result_of_one(tmp_path):
    from safetensors.torch import load_file

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        alone = dit()  # by this process, meanwhile
        quantize(alone, CONFIG, calibration=SHARED)
        _, said = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, said[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "model", "worker.py"]
    for rank in range(2):
        assert_equal(load_file(tmp_path / f"{rank}.safetensors"), tensors(alone.transformer))


def test_a_bare_unet_is_calibrated_with_noise_and_labels():
    labels = [0, 1]
    plain = quantize(unet(), RTNConfig(bits=2))
    calibrated = quantize(unet(), RTNConfig(bits=2), calibration={"class_labels": labels, "steps": 3})
    assert any(isinstance(module, PackedLayer) and isinstance(module, torch.nn.Conv2d) for module in calibrated.modules())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        exact, *others = (m(x, 500, class_labels=torch.tensor(labels))[0] for m in (unet(), plain, calibrated))
    errors = [float((other - exact).square().mean()) for other in others]
    assert errors[1] < errors[0]


def test_a_bare_model_that_needs_labels_says_so():
    with pytest.raises(ConfigError, match="needs class_labels"):
        quantize(unet(), RTNConfig(bits=2), calibration={"samples": 2})


def test_an_unconditional_pipeline_is_calibrated_with_noise():
    pipe = quantize(DDIMPipeline(unet(None), DDIMScheduler()), RTNConfig(bits=4), calibration={"samples": 2, "steps": 2})
    assert any(isinstance(module, PackedLayer) for module in pipe.unet.modules())


def test_a_loss_that_is_no_number_is_an_error_that_keeps_finished_layers(tmp_path):
    pipe = dit()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"NaN or infinity|loss became nan"):
        quantize(pipe, RTNConfig(bits=4), tmp_path / "out", calibration=Calibration(**FEW, tuning=Tuning(steps=2)))
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out-calibration").rglob("layers/*.safetensors"))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (["a prompt"], "needs class labels for calibration, got prompt"),
        ({"samples": 2}, "needs class labels for calibration, got neither"),
    ],
)
def test_what_the_pipeline_cannot_take_is_refused(calibration, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        quantize(dit(), RTNConfig(bits=4), tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_calibrated_again():
    pipe = quantize(dit(), RTNConfig(bits=4))
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(pipe, RTNConfig(bits=4), calibration=FEW)


def test_a_workspace_with_other_work_is_refused(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        quantize(dit(), RTNConfig(bits=4), calibration=FEW | {"workspace": tmp_path / "work"})
    assert (tmp_path / "work" / "file").read_text() == "mine"


def test_guidance_weighs_the_two_halves_as_the_pipeline_does():
    teacher, student, x = torch.zeros(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.randn(2, 1, 2, 2)
    inputs = {"hidden_states": torch.cat([x, x])}
    first, second = student.chunk(2)
    labels = guided_loss(student, teacher, inputs | {"class_labels": torch.zeros(4)}, 3.0)
    prompts = guided_loss(student, teacher, inputs, 3.0)
    torch.testing.assert_close(labels, (second + 3 * (first - second)).square().mean())
    torch.testing.assert_close(prompts, (first + 3 * (second - first)).square().mean())
    torch.testing.assert_close(
        guided_loss(student, teacher, {"hidden_states": torch.randn(4, 1, 2, 2)}, 3.0), student.square().mean()
    )
    torch.testing.assert_close(guided_loss(student, teacher, inputs, None), student.square().mean())


def test_the_command_line_calibrates(tmp_path):
    from qdiff_diffusers.cli.app import main

    dit().save_pretrained(tmp_path / "dense")
    arguments = ["quantize", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "-m", "rtn", "-b", "2", "--dtype", "float32"]
    arguments += ["--calibrate", "0-1", "--samples", "2", "--steps", "2", "--guidance", "1", "--tune", "2"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    stored = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["provenance"]["calibration"]
    assert (stored["class_labels"], stored["samples"], stored["steps"], stored["tuning"]["steps"]) == ([0, 1], 2, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "3"], "go with --calibrate"),
        (["--calibrate", "no-such-file.txt"], "cannot read prompts"),
        (["--calibrate", "3-1"], "classes are such as"),
        (["--calibrate", "noise", "--objective", "layers"], "objective must be one of"),
    ],
)
def test_the_command_line_refuses_what_cannot_work_before_it_begins(options, message, tmp_path, capsys):
    from qdiff_diffusers.cli.app import main

    with pytest.raises(SystemExit) as done:
        main(["quantize", str(tmp_path), "-o", str(tmp_path / "out"), "-m", "rtn", *options])
    assert done.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("objective", ["model", "blocks"])
def test_minutes_buy_as_many_steps_as_they_allow(objective, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_module, "STEP_OVERHEAD", 1.0)
    calibration = Calibration(**FEW, hessian=False, tuning=Tuning(minutes=0.02, objective=objective))
    folder = quantize(dit(), AQConfig(bits=2), tmp_path / "out", calibration=calibration)
    log = json.loads((folder / "transformer" / "calibration.json").read_text())
    assert max(entry["step"] for entry in log if entry["stage"] == "tuning") >= 1


def test_steps_and_minutes_together_are_refused():
    with pytest.raises(ConfigError, match="steps or minutes"):
        Tuning(steps=3, minutes=2)


def mean_bits(pipe) -> float:
    """Stored, per packed weight."""
    layers = [module for module in pipe.transformer.modules() if isinstance(module, PackedLayer)]
    sizes = [torch.Size(layer.weight_shape).numel() for layer in layers]
    return sum(layer.bits_per_weight * n for layer, n in zip(layers, sizes, strict=True)) / sum(sizes)


def test_mixed_bits_cost_no_more_and_err_less():
    uniform = quantize(dit(), RTNConfig(bits=3), calibration=FEW | {"hessian": False})
    mixed = quantize(dit(), RTNConfig(bits=3), calibration=FEW | {"hessian": False, "mixed": True})
    assert mean_bits(mixed) <= mean_bits(uniform)
    assert output_error(mixed) < 0.9 * output_error(uniform)
    layers = mixed.transformer.config.quantization_config.layers.values()
    assert len({layer.spec.format.bits for layer in layers}) > 1


def test_bits_are_spent_where_they_gain_most():
    offered = {"loud": [(1, 8.0, 1), (2, 4.0, 2), (4, 1.0, 4)], "quiet": [(1, 1.0, 1), (2, 0.5, 2), (4, 0.1, 4)]}
    costs = {name: [Choice(stored, loss, {"bits": bits}) for stored, loss, bits in offers] for name, offers in offered.items()}

    def spent(budget: float) -> dict[str, float]:
        return {name: chosen["bits"] for name, chosen in allocate_bits(costs, {"loud": 10, "quiet": 10}, budget).items()}

    assert spent(40) == {"loud": 2, "quiet": 2}
    assert spent(50) == {"loud": 4, "quiet": 1}
    assert spent(80) == {"loud": 4, "quiet": 4}
    assert spent(0) == {"loud": 1, "quiet": 1}


def test_rank_goes_where_it_gains_most():
    """A layer of rank 1 gets no more than that; others share the rest."""
    pipe = dit()
    low = pipe.transformer.transformer_blocks[0].attn1.to_q.weight.data
    low.copy_(0.3 * torch.randn(len(low), 1) @ torch.randn(1, low.shape[1]))
    config = SVDQuantConfig(bits=4, branch_bits=1.0)
    uniform = quantize(copy.deepcopy(pipe), config, calibration=FEW | {"hessian": False})
    mixed = quantize(copy.deepcopy(pipe), config, calibration=FEW | {"hessian": False, "mixed": True})
    layers = mixed.transformer.config.quantization_config.layers
    assert layers["transformer_blocks.0.attn1.to_q"].spec.rank <= 1 < max(layer.spec.rank for layer in layers.values())
    assert len({layer.spec.format.bits for layer in layers.values()}) == 1
    assert mean_bits(mixed) <= mean_bits(uniform)
    assert output_error(mixed, pipe) < output_error(uniform, pipe)


def test_mixed_bits_need_bits():
    with pytest.raises(ConfigError, match="mixed precision needs bits"):
        quantize(dit(), AQConfig(num_codebooks=1, codebook_bits=4, vector_size=4), calibration=FEW | {"mixed": True})


def test_rounding_begins_at_the_weight_itself_and_ends_on_a_neighbour():
    from qdiff_diffusers.calibration.trainable import RoundedWeight, make_trainable
    from qdiff_diffusers.methods import format_target, quantize_weight

    weight = torch.randn(16, 64)
    for config in (RTNConfig(bits=3, group_size=16), FPConfig(bits=4), FPConfig(weight_format="mxfp4")):
        quantized = quantize_weight(weight, config)
        target = format_target(weight, quantized.spec, quantized.tensors)
        trained = make_trainable(quantized.spec.format, quantized.tensors, 64, target, Tuning(assignments="rounding"))
        assert isinstance(trained, RoundedWeight)
        values, nearest = trained().detach(), quantized.spec.format.dequantize(quantized.tensors, 64)
        inside = (values - target).abs() < 1e-4
        assert inside.float().mean() > 0.8  # the others lie beyond the largest level
        packed = quantized.spec.format.dequantize(trained.pack(), 64)
        assert (packed == nearest).float().mean() > 0.99  # nothing learned yet: round to nearest, but for ties
        with torch.no_grad():
            trained.logits.fill_(9.0)
        upward = quantized.spec.format.dequantize(trained.pack(), 64)
        assert ((upward - values) * torch.sign(trained.scale) >= -1e-4).all()


def test_inference_mode_around_it_does_no_harm():
    pipe = dit()
    with torch.inference_mode():
        quantize(pipe, RTNConfig(bits=2), calibration=Calibration(**FEW, tuning=Tuning(steps=2)))
    assert any(isinstance(module, PackedLayer) for module in pipe.transformer.modules())
