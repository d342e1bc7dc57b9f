"""Judge style adapters on 64 prompts that their data sets do not hold.

    python -m samples.evaluate_styles --neon runs/neon/neon.safetensors --ink runs/ink/ink.safetensors

Writes `samples/style_evaluation.json` and the pictures in `samples/images`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.grid import contact_sheet
from lora_diffusion.generation.request import Request
from lora_diffusion.models.load import load_model
from samples.judge import Judge
from samples.prompts import Prompt, style_prompts

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent
STYLES = ("neon", "ink")
STEPS, GUIDANCE, SAMPLER = 25, 5.0, "ddim"
STRENGTHS = (0.0, 0.5, 1.0)
SHEET_ROWS = (0, 3, 6, 9, 11, 12)  # prompts of different kinds and colours


def draw(engine: Engine, prompts: Sequence[Prompt], adapters: Mapping[str, float]) -> list[Image.Image]:
    """One picture per prompt with its own seed."""
    return engine.generate(
        [
            Request(prompt.text, seed=prompt.seed, steps=STEPS, cfg=GUIDANCE, sampler=SAMPLER, adapters=adapters)
            for prompt in prompts
        ]
    )


def shares(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[Prompt], style: str) -> dict[str, float]:
    """Share of pictures in the style, with the right object, and both."""
    scores = judge.score(images, prompts, style)
    in_style, right = np.array(scores["style_right"]), np.array(scores["kind_right"])
    return {"style": float(in_style.mean()), "content": float(right.mean()), "both": float((in_style & right).mean())}


def mean_difference(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixel values in [0, 1]."""
    return float(
        np.mean([np.abs(np.asarray(x, float) - np.asarray(y, float)).mean() / 255 for x, y in zip(a, b, strict=True)])
    )


def evaluate(engine: Engine, judge: Judge) -> tuple[dict[str, object], Image.Image]:
    """Each style at strength 0, 0.5 and 1, both together at 0.5, and a sheet of some of the pictures."""
    result: dict[str, object] = {"prompts": len(style_prompts("neon")), "steps": STEPS, "guidance": GUIDANCE}
    columns: list[tuple[str, list[Image.Image]]] = []
    for style in STYLES:
        prompts = style_prompts(style)
        pictures = {strength: draw(engine, prompts, {style: strength}) for strength in STRENGTHS}
        result[style] = {
            str(strength): shares(judge, images, prompts, style)
            | {"difference_from_base": round(mean_difference(images, pictures[0.0]), 4)}
            for strength, images in pictures.items()
        }
        columns += [("base" if s == 0 else f"{style} {s:g}", pictures[s]) for s in STRENGTHS if s or style == "neon"]
        logger.info("%s: %s", style, result[style])
    mixed = draw(engine, style_prompts("neon"), {"neon": 0.5, "ink": 0.5})
    columns.append(("neon 0.5 + ink 0.5", mixed))
    rows = [[images[i] for _, images in columns] for i in SHEET_ROWS]
    labels = [prompt.text.removesuffix(", neon style") for prompt in style_prompts("neon")]
    return result, contact_sheet(rows, [labels[i] for i in SHEET_ROWS], [name for name, _ in columns])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(SAMPLES / "base"))
    parser.add_argument("--output", type=Path, default=SAMPLES, help="folder of the JSON and of images/")
    for style in STYLES:
        parser.add_argument(f"--{style}", type=Path, default=SAMPLES / "adapters" / f"{style}.safetensors")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine = Engine(load_model(arguments.base), batch_size=16)
    for style in STYLES:
        engine.load_adapter(style, AdapterFile.read(getattr(arguments, style)))
    result, sheet = evaluate(engine, Judge.load())
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    (arguments.output / "style_evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sheet.save(arguments.output / "images" / "styles.png", optimize=True)


if __name__ == "__main__":
    main()
