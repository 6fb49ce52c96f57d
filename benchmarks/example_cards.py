"""The model cards in docs/examples/: the demo model at 2 and 4 bits, evaluated, as `qdiff push --eval` would upload them.

python benchmarks/example_cards.py [--html FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from qdiff_diffusers import AQConfig, SVDQuantConfig
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.evaluate import Settings, run_eval
from qdiff_diffusers.evaluation.rows import parse_rows
from qdiff_diffusers.evaluation.subject import find_subject
from qdiff_diffusers.hub import read_evaluation, render_card

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
CONFIGS = {
    "fashion-dit-aq-2bit": AQConfig(bits=2),
    "fashion-dit-svdquant-4bit": SVDQuantConfig(bits=4, activations="int8"),
}
IMAGES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--html", type=Path, help="also write the cards as pages, to be looked at")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        folders = {name: Path(workspace, name) for name in CONFIGS}
        for name, folder in folders.items():
            quantization = PipelineQuantizationConfig(quant_mapping={"transformer": CONFIGS[name]})
            pipe = DiffusionPipeline.from_pretrained(DEMO_MODEL, quantization_config=quantization, dtype=torch.float16)
            pipe.save_pretrained(folder)
        subject, output = find_subject("dit"), Path(workspace, "out")
        command = f"qdiff eval dit {' '.join(f'-c {name}' for name in folders)} --images {IMAGES} -o out"
        rows = parse_rows([{"name": name, "folder": str(folder)} for name, folder in folders.items()], subject)
        run_eval(subject, rows, output, Settings(images=IMAGES), command=command)
        for name, folder in folders.items():
            evaluated, target = read_evaluation(output, folder), EXAMPLES / name
            card = str(render_card(folder, f"your-name/{name}", evaluated=evaluated))
            write_example(target, {"README.md": card.encode(), **evaluated.files()})
            if arguments.html:
                write_page(card, target, arguments.html / f"{name}.html")


def write_example(target: Path, files: dict[str, bytes]) -> None:
    """What `qdiff push` uploads beside the checkpoint."""
    for name, content in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_page(card: str, images_in: Path, path: Path) -> None:
    """A card roughly as the Hub shows it: the metadata in a box, then the text."""
    from html import escape

    from markdown_it import MarkdownIt

    _, metadata, text = card.split("---\n", 2)
    style = "body{font:16px sans-serif;max-width:900px;margin:2em auto}td,th{border:1px solid #ccc;padding:4px 8px}"
    style += "table{border-collapse:collapse;margin:1em 0}pre{background:#f4f4f4;padding:8px;overflow:auto}img{max-width:100%}"
    base = f'<base href="{images_in.resolve().as_uri()}/">'
    page = f"<meta charset=utf-8>{base}<style>{style}</style><pre>{escape(metadata)}</pre>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + MarkdownIt("commonmark").enable("table").render(text))


if __name__ == "__main__":
    main()
