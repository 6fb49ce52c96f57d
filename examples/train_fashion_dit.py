"""Train the demo's diffusion transformer on Fashion-MNIST and write it as an ordinary diffusers folder.

    python examples/train_fashion_dit.py --out fashion-dit --minutes 60
    python examples/train_fashion_dit.py --out better --init fashion-dit --lr 5e-4 --minutes 30

diffusers' own ``DiTTransformer2DModel`` in pixel space (8 M parameters, 64 tokens), v-prediction, cosine noise schedule,
class labels dropped at random for classifier-free guidance, exponential moving average of the weights. One hour gives clothes
at 20 DDIM steps even on two CPU cores; a GPU needs minutes. ``DiffusionPipeline.from_pretrained(out)`` loads the result.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from fashion_mnist import CLASSES, DEFAULT_FOLDER, load_split
from rich.progress import Progress
from torch import Tensor, nn

NULL_LABEL = 1000  # DiTPipeline's label of "no class"; rows 10 to 999 of the label tables stay zero
MODEL: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_embeds_ada_norm": NULL_LABEL,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # DDIM clips the image without recomputing the noise, which ruins thin shapes
}


def new_model() -> DiTTransformer2DModel:
    """A fresh model with the initialisation of the DiT paper (Peebles and Xie 2022, adaLN-Zero)."""
    model = DiTTransformer2DModel(**MODEL)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        embedder = block.norm1.emb
        for linear in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        table = embedder.class_embedder.embedding_table.weight
        nn.init.zeros_(table)
        nn.init.normal_(table.data[[*range(len(CLASSES)), NULL_LABEL]], std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    return model


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


def train(model: DiTTransformer2DModel, images: Tensor, labels: Tensor, args: argparse.Namespace) -> DiTTransformer2DModel:
    """Train in place until the time or the steps are over. Returns the averaged model."""
    # Evaluation mode: DiT's own label dropout would draw anew in every block.
    model = model.to(args.device).eval()
    average = copy.deepcopy(model).requires_grad_(False)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    forward = torch.compile(model) if args.compile else model
    start, step, done = time.monotonic(), 0, 0.0
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while done < 1:
            chosen = torch.randint(len(images), (args.batch,))
            x, y = images[chosen].to(args.device), labels[chosen].to(args.device)
            loss = training_loss(forward, x, y, alphas, args.label_dropout)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, step, done)
            optimizer.step()
            step += 1
            update_average(average, model, min(args.ema, (1 + step) / (10 + step)))
            done = (time.monotonic() - start) / (60 * args.minutes) if args.steps is None else step / args.steps
            if step % 20 == 0:
                progress.update(bar, completed=done, description=f"step {step}, loss {loss.item():.4f}")
        progress.update(bar, completed=1.0)
    return average.cpu()


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


def export(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write a folder of float16 weights that ``DiffusionPipeline.from_pretrained`` loads as a ``DiTPipeline``."""
    names = {str(label): name for label, name in enumerate(CLASSES)}
    pipe = DiTPipeline(transformer=model.half(), vae=identity_vae().half(), scheduler=DDIMScheduler(**SCHEDULER), id2label=names)
    pipe.register_to_config(id2label=names)
    pipe.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--init", type=Path, help="continue from such a folder instead of from nothing")
    parser.add_argument("--minutes", type=float, default=60.0, help="the learning rate reaches zero when they are over")
    parser.add_argument("--steps", type=int, help="stop after these many steps instead")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    images, labels = load_split("train", args.data)
    if args.init:
        model = DiTTransformer2DModel.from_pretrained(args.init, subfolder="transformer", dtype=torch.float32)
    else:
        model = new_model()
    export(train(model, images, labels, args), args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
