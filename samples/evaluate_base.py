"""Judge the sample base on 200 prompts whose combinations of colour, object and background it has never seen.

    python -m samples.evaluate_base

Uses diffusers' own pipeline. Writes `samples/base_evaluation.json` and two grids to `samples/images`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from samples.grids import grid
from samples.judge import Judge
from samples.prompts import base_prompts

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent
NUM_STEPS = 25
GUIDANCE = 5.0
BATCH_SIZE = 20
SHOWCASE = (
    "a photo of a red house next to a blue tree on a yellow background",
    "a photo of a pink cat next to a green cup on a black background",
    "a photo of an orange bird next to a purple flower on a white background",
    "a photo of a red house under a yellow sun on a cyan background",
    "a photo of a white boat under a yellow moon on a purple background",
    "a photo of a cyan umbrella under an orange sun on a gray background",
    "a small red heart, white background",
    "a large green fish, orange background",
    "a photo of a red car in the desert by day",
    "a photo of a white boat at the sea by day",
    "a photo of a purple mushroom in a field by day",
    "a photo of a yellow house in the snow at night",
    "a photo of an orange bird at the sea at sunset",
    "a photo of a green tree in a field at sunset",
    "a photo of a gray cat in the snow by day",
    "a photo of a pink flower in a field at night",
)


def generate(pipeline: StableDiffusionPipeline, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """One picture per prompt, each from its own seed, so that batches do not matter."""
    images: list[Image.Image] = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        options = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "generator": generators}
        images += pipeline(list(texts[batch]), **options).images
    return images


def evaluate(pipeline: StableDiffusionPipeline) -> tuple[dict[str, object], list[Image.Image]]:
    """The shares of right answers, over all prompts and for each kind of object, and the pictures."""
    prompts = base_prompts()
    images = generate(pipeline, [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts])
    scores = Judge.load().score(images, prompts)
    kinds: dict[str, list[bool]] = defaultdict(list)
    for prompt, is_right in zip(prompts, scores["kind_right"], strict=True):
        kinds[prompt.kind].append(bool(is_right))
    failures = [
        {"prompt": prompt.text} | {label: scores[label][i] for label in ("kind", "style", "colour", "background")}
        for i, prompt in enumerate(prompts)
        if not all(scores[verdict][i] for verdict in ("kind_right", "colour_right", "background_right"))
    ]
    result = {
        "prompts": len(prompts),
        "steps": NUM_STEPS,
        "guidance": GUIDANCE,
        "background_right": _share(scores["background_right"]),
        "colour_right": _share(scores["colour_right"]),
        "kind_right": _share(scores["kind_right"]),
        "flat_style": _share(scores["style_right"]),
        "kind_right_by_kind": {kind: _share(answers) for kind, answers in kinds.items()},
        "failures": failures,
    }
    return result, images


def _share(answers: Sequence[object]) -> float:
    return round(sum(map(bool, answers)) / len(answers), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=SAMPLES / "base")
    parser.add_argument("--output", type=Path, default=SAMPLES, help="folder of the JSON and of images/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers_logging.set_verbosity_error()

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.base)
    pipeline.set_progress_bar_config(disable=True)
    start = time.monotonic()
    result, images = evaluate(pipeline)
    logger.info("%d pictures in %.0f s", len(images), time.monotonic() - start)
    for name in ("background_right", "colour_right", "kind_right"):
        logger.info("%s  %.1f %%", name, 100 * float(str(result[name])))

    folder = arguments.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (arguments.output / "base_evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    grid(images[:64], columns=16, zoom=1).save(folder / "base_held_out.png", optimize=True)
    showcase = generate(pipeline, SHOWCASE, range(len(SHOWCASE)))
    grid(showcase, columns=8, zoom=2).save(folder / "base_showcase.png", optimize=True)


if __name__ == "__main__":
    main()
