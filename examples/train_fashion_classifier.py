"""Train the demo's classifier on Fashion-MNIST: about 92 % test accuracy after a few minutes on two cores.

    python examples/train_fashion_classifier.py --out classifier

Writes ``model.safetensors`` (float16 weights), ``statistics.npz``: mean and covariance of the features of the 10,000 test
images, the reference of the Frechet distance; and ``features.safetensors``: those of the first 2,000, for precision and recall.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_mnist import DEFAULT_FOLDER, load_split
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from qdiff_diffusers.evaluation import FashionCNN, class_accuracy, feature_statistics, load_classifier, save_statistics
from qdiff_diffusers.evaluation.classifier import classify

KEPT_FEATURES = 2000


def train(images: Tensor, labels: Tensor, *, steps: int, batch: int, lr: float, device: str) -> FashionCNN:
    """AdamW with a one-cycle learning rate, mirrored images and label smoothing."""
    model = FashionCNN().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for _ in track(range(steps), "training"):
        chosen = torch.randint(len(images), (batch,))
        x, y = images[chosen].to(device), labels[chosen].to(device)
        mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits = model(torch.where(mirrored, x.flip(3), x).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().cpu()


def save(model: FashionCNN, test_images: Tensor, test_labels: Tensor, folder: Path) -> float:
    """Write the weights, then the feature statistics of exactly what was written. Returns the test accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    stored = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    features, logits = classify(load_classifier(path), test_images)
    save_statistics(folder / "statistics.npz", feature_statistics(features))
    save_file({"features": features[:KEPT_FEATURES].half()}, folder / "features.safetensors")
    return class_accuracy(logits, test_labels.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, default=Path("classifier"), help="folder to write")
    parser.add_argument("--steps", type=int, default=2800, help="about six epochs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = train(*load_split("train", args.data), steps=args.steps, batch=args.batch, lr=args.lr, device=args.device)
    accuracy = save(model, *load_split("t10k", args.data), args.out)
    print(f"test accuracy {accuracy:.2%}, written to {args.out}")


if __name__ == "__main__":
    main()
