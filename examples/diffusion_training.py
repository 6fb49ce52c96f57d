"""What both training scripts of the bundled models share: the loss, the loop, an autoencoder that changes nothing, the export."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, ModelMixin
from fashion_mnist import CLASSES, DEFAULT_FOLDER, load_split
from rich.progress import Progress
from torch import Tensor, nn

NULL_LABEL = 1000  # DiTPipeline's label of "no class"; rows 10 to 999 of the label tables stay zero
USED_LABELS = [*range(len(CLASSES)), NULL_LABEL]
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # DDIM clips the image without recomputing the noise, which ruins thin shapes
}
SAVE_SECONDS = 120.0  # between two checkpoints


def training_loss(model: nn.Module, images: Tensor, labels: Tensor, alphas: Tensor, label_dropout: float) -> Tensor:
    """Mean squared error of v at one random timestep per image, the timesteps stratified over the batch."""
    batch, device = len(images), images.device
    clean = 2 * images - 1
    labels = labels.masked_fill(torch.rand(batch, device=device) < label_dropout, NULL_LABEL)
    quantiles = (torch.randperm(batch, device=device) + torch.rand(batch, device=device)) / batch
    timesteps = (quantiles * len(alphas)).long().clamp_max(len(alphas) - 1)
    signal, noise_level = (a[timesteps].view(-1, 1, 1, 1) for a in (alphas.sqrt(), (1 - alphas).sqrt()))
    noise = torch.randn_like(clean)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        velocity = model(signal * clean + noise_level * noise, timestep=timesteps, class_labels=labels).sample
    return F.mse_loss(velocity.float(), signal * noise - noise_level * clean)


class Run:
    """A training in progress: model, moving average, optimizer, steps and seconds so far; saved to ``path`` if there is one."""

    def __init__(self, model: nn.Module, lr: float, path: Path | None) -> None:
        self.model, self.average, self.path = model, copy.deepcopy(model).requires_grad_(False), path
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        if path and path.is_file():
            state = torch.load(path, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for part in ("model", "average", "optimizer"):
                getattr(self, part).load_state_dict(state[part])

    def save(self) -> None:
        if self.path:
            state = {part: getattr(self, part).state_dict() for part in ("model", "average", "optimizer")}
            part = self.path.with_name(self.path.name + ".part")
            torch.save(state | {"step": self.step, "seconds": self.seconds}, part)
            part.replace(self.path)


def train(model: ModelMixin, images: Tensor, labels: Tensor, args: argparse.Namespace) -> ModelMixin:
    """Train in place until the time or the steps are over. Returns the averaged model."""
    # Evaluation mode: DiT's own label dropout would draw anew in every block.
    run = Run(model.to(args.device).eval(), args.lr, args.checkpoint)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(args.device)
    forward = torch.compile(run.model) if args.compile else run.model
    torch.manual_seed(run.step)  # a continued run does not repeat the batches of its beginning
    done, started, saved = 0.0, time.monotonic() - run.seconds, run.seconds
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while done < 1:
            chosen = torch.randint(len(images), (args.batch,))
            x, y = images[chosen].to(args.device), labels[chosen].to(args.device)
            loss = training_loss(forward, x, y, alphas, args.label_dropout)
            run.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, run.step, done)
            run.optimizer.step()
            run.step, run.seconds = run.step + 1, time.monotonic() - started
            update_average(run.average, run.model, min(args.ema, (1 + run.step) / (10 + run.step)))
            done = run.seconds / (60 * args.minutes) if args.steps is None else run.step / args.steps
            if run.step % 20 == 0:
                progress.update(bar, completed=done, description=f"step {run.step}, loss {loss.item():.4f}")
            if run.seconds - saved > SAVE_SECONDS:
                run.save()
                saved = run.seconds
        progress.update(bar, completed=1.0)
    run.save()
    return run.average.cpu()


def learning_rate(peak: float, step: int, done: float, warmup_steps: int = 400) -> float:
    """Linear warm-up, then a cosine to zero over the run, of which the share ``done`` is behind us."""
    return peak * min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def identity_vae(scale: float = 64.0) -> AutoencoderTiny:
    """An autoencoder that changes nothing: the model works on pixels, DiTPipeline expects latents.

    ``scale`` keeps the encoder's hidden values in the linear range of its saturating layers. The decoder passes ``z`` through
    a ReLU as ``relu(z) - relu(-z)``.
    """
    vae = AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        scaling_factor=scale,
        encoder_block_out_channels=(1,),
        num_encoder_blocks=(0,),
        decoder_block_out_channels=(2,),
        num_decoder_blocks=(0,),
    )
    for parameter in vae.parameters():
        nn.init.zeros_(parameter)
    centre = (slice(None), slice(None), 1, 1)  # of a 3x3 kernel
    encode_in, encode_out = vae.encoder.layers[0], vae.encoder.layers[1]
    decode_in, decode_out = vae.decoder.layers[0], vae.decoder.layers[2]
    with torch.no_grad():
        encode_in.weight[centre] = 1.0  # receives (x + 1) / 2
        encode_out.weight[centre] = 2 / scale
        encode_out.bias.fill_(-1 / scale)
        decode_in.weight[centre] = torch.tensor([[1.0], [-1.0]])
        decode_out.weight[centre] = torch.tensor([[scale / 2, -scale / 2]])
        decode_out.bias.fill_(0.5)
    return vae.eval()


def export(model: ModelMixin, folder: Path) -> None:
    """Write a folder of float16 weights that ``DiffusionPipeline.from_pretrained`` loads as a ``DiTPipeline``."""
    names = {str(label): name for label, name in enumerate(CLASSES)}
    pipe = DiTPipeline(transformer=model.half(), vae=identity_vae().half(), scheduler=DDIMScheduler(**SCHEDULER), id2label=names)
    pipe.register_to_config(id2label=names)
    pipe.save_pretrained(folder)


def main(new_model: Callable[[], ModelMixin], description: str | None, **defaults: Any) -> None:
    """The command line of a training script. ``defaults`` replace those of its options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--init", type=Path, help="continue from such a folder instead of from nothing")
    parser.add_argument("--checkpoint", type=Path, help="file for the state of the training; if it exists, go on from there")
    parser.add_argument("--minutes", type=float, default=60.0, help="the learning rate reaches zero when they are over")
    parser.add_argument("--steps", type=int, help="stop after these many steps instead")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    images, labels = load_split("train", args.data)
    model = new_model()
    if args.init:
        model = type(model).from_pretrained(args.init, subfolder="transformer", dtype=torch.float32)
    export(train(model, images, labels, args), args.out)
    print(f"written to {args.out}")
