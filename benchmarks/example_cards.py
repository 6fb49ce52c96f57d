"""The model cards in docs/examples/: the demo model at 2 and 4 bits, measured, with samples, as `qdiff push` would upload them.

python benchmarks/example_cards.py [--html FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from datetime import date
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from PIL import Image

from qdiff_diffusers import AQConfig, QDiffConfig, SVDQuantConfig
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.metrics import psnr, ssim
from qdiff_diffusers.evaluation.sampling import image_labels, image_seeds, sample
from qdiff_diffusers.hub import Result, Results, render_card, write_results

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
CONFIGS = {
    "fashion-dit-aq-2bit": AQConfig(bits=2, codebook="shared", effort=0, num_codebooks=3, codebook_bits=8, vector_size=10),
    "fashion-dit-svdquant-4bit": SVDQuantConfig(bits=4, activations="int8"),
}
IMAGES, SHOWN, STEPS = 10, 5, 20


def images(pipe: DiffusionPipeline) -> torch.Tensor:
    return sample(pipe, image_labels(IMAGES, 10), image_seeds(IMAGES), steps=STEPS)


def strip(pictures: torch.Tensor, path: Path) -> None:
    """The first images in a row, four times as large."""
    row = torch.cat(list(pictures[:SHOWN]), dim=2)[0]
    image = Image.fromarray((255 * row.clamp(0, 1)).round().byte().numpy())
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(path)


def make(name: str, config: QDiffConfig, reference: torch.Tensor, folder: Path) -> str:
    """Quantize, measure, and put everything that `qdiff push` uploads into ``folder``; the card."""
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = DiffusionPipeline.from_pretrained(DEMO_MODEL, quantization_config=quantization, dtype=torch.float16)
    pipe.save_pretrained(folder)
    pictures = images(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    results = [
        Result("psnr", "PSNR against the 16-bit images", round(psnr(pictures, reference).mean().item(), 2), "dB"),
        Result("ssim", "SSIM against the 16-bit images", round(ssim(pictures, reference).mean().item(), 4)),
    ]
    protocol = f"{IMAGES} images, one per class, {STEPS} DDIM steps, guidance 2, seeds 0 to {IMAGES - 1}, the same for both models."
    notes = {"command": "python benchmarks/example_cards.py", "date": date.today().isoformat()}
    write_results(folder, Results(results, "zalando-datasets/fashion_mnist", "Fashion-MNIST", protocol, notes))
    (folder / "samples").mkdir(exist_ok=True)
    strip(pictures, folder / "samples" / "seeds-0-to-4.png")
    strip(reference, folder / "samples" / "seeds-0-to-4-16bit.png")
    return str(render_card(folder, f"your-name/{name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--html", type=Path, help="also write the cards as pages, to be looked at")
    arguments = parser.parse_args()
    reference = images(DiffusionPipeline.from_pretrained(DEMO_MODEL, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as workspace:
        for name, config in CONFIGS.items():
            folder, target = Path(workspace, name), EXAMPLES / name
            card = make(name, config, reference, folder)
            (target / "samples").mkdir(parents=True, exist_ok=True)
            (target / "README.md").write_text(card)
            for picture in (folder / "samples").iterdir():
                shutil.copy(picture, target / "samples")
            if arguments.html:
                write_page(card, target, arguments.html / f"{name}.html")


def write_page(card: str, images_in: Path, path: Path) -> None:
    """A card roughly as the Hub shows it: the metadata in a box, then the text."""
    from html import escape

    from markdown_it import MarkdownIt

    _, metadata, text = card.split("---\n", 2)
    style = "body{font:16px sans-serif;max-width:900px;margin:2em auto}td,th{border:1px solid #ccc;padding:4px 8px}"
    style += "table{border-collapse:collapse}pre{background:#f4f4f4;padding:8px;overflow:auto}img{max-width:100%}"
    base = f'<base href="{images_in.resolve().as_uri()}/">'
    page = f"<meta charset=utf-8>{base}<style>{style}</style><pre>{escape(metadata)}</pre>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + MarkdownIt("commonmark").enable("table").render(text))


if __name__ == "__main__":
    main()
