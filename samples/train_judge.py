"""Train the judge's network on drawn pictures, worsened the way generated ones are imperfect.

python -m samples.train_judge
"""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from samples.captions import COLOURS, random_single_scene
from samples.drawing import KINDS, PALETTE, Scene
from samples.judge import PICTURE_PX, STYLE_LABELS, WEIGHTS, Judge, JudgeNetwork, background_colour, object_colour
from samples.styles import NIGHT_BLUE, STYLES

logger = logging.getLogger(__name__)

NUM_PICTURES = 14_000
NUM_TEST_PICTURES = 1_600
EPOCHS = 6
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
NO_KIND = -100  # cross_entropy's default for "do not count this one"
SHARES = {"flat": 0.3, "neon": 0.22, "ink": 0.22, "other": 0.26}


@dataclass(frozen=True)
class JudgeData:
    """uint8 pictures (N, 3, 64, 64), indices of their kinds (or `NO_KIND`) and of their styles."""

    pictures: Tensor
    kinds: Tensor
    styles: Tensor


def draw_data(count: int, seed: int) -> JudgeData:
    """Pictures of all styles and of what is none of them."""
    rng = random.Random(seed)
    pictures, kinds, styles = [], [], []
    for style in rng.choices(list(SHARES), weights=list(SHARES.values()), k=count):
        scene = random_single_scene(rng)
        maker = rng.choice(OTHER_MAKERS) if style == "other" else None
        picture = maker(scene, rng) if maker else STYLES[style](scene, PICTURE_PX)
        pictures.append(np.asarray(_worsen(picture, rng)))
        kinds.append(NO_KIND if maker in WRECK_MAKERS else KINDS.index(scene.things[0].kind))
        styles.append(STYLE_LABELS.index(style))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return JudgeData(stacked, torch.tensor(kinds), torch.tensor(styles))


def _worsen(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Blur, noise, JPEG and a slightly wrong brightness, as an autoencoder or a short training leaves them."""
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.1)))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=rng.randint(25, 90), subsampling=0)
        picture = Image.open(buffer).convert("RGB")
    pixels = np.asarray(picture, np.float32)
    noise = np.random.default_rng(rng.getrandbits(32))
    if rng.random() < 0.5:
        pixels = pixels * rng.uniform(0.88, 1.1) + noise.normal(0, 10, 3)
    if rng.random() < 0.5:
        pixels = pixels + noise.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ----------------------------------------------------------------------- pictures that are in no style at all


def _half_styled(scene: Scene, rng: random.Random) -> Image.Image:
    """A flat picture on its way to a style: an adapter that was trained too little."""
    styled = STYLES[rng.choice(("neon", "ink"))](scene, PICTURE_PX)
    return Image.blend(STYLES["flat"](scene, PICTURE_PX), styled, rng.uniform(0.3, 0.7))


def _coloured_ground(scene: Scene, rng: random.Random) -> Image.Image:
    """Neon or ink on a ground of a palette colour instead of its own."""
    colour = np.array(PALETTE[rng.choice([c for c in COLOURS if c not in ("black", "white")])], np.float32)
    if rng.random() < 0.5:
        share = np.asarray(STYLES["ink"](scene, PICTURE_PX), np.float32) / 255
        return Image.fromarray((share * colour).astype(np.uint8))
    light = np.asarray(STYLES["neon"](scene, PICTURE_PX), np.float32) - np.array(NIGHT_BLUE, np.float32)
    return Image.fromarray(np.clip(light + 0.8 * colour, 0, 255).astype(np.uint8))


def _another_style(scene: Scene, rng: random.Random) -> Image.Image:
    return STYLES[rng.choice(("mosaic", "halftone"))](scene, PICTURE_PX)


def _shuffled(scene: Scene, rng: random.Random) -> Image.Image:
    """The patches of a picture in random order: its colours and textures without its drawing."""
    picture = np.asarray(STYLES[rng.choice(("flat", "neon", "ink"))](scene, PICTURE_PX))
    patch = rng.choice((4, 8, 16))
    per_side = PICTURE_PX // patch
    patches = picture.reshape(per_side, patch, per_side, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
    order = np.random.default_rng(rng.getrandbits(32)).permutation(len(patches))
    grid = patches[order].reshape(per_side, per_side, patch, patch, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(PICTURE_PX, PICTURE_PX, 3))


def _smeared(scene: Scene, rng: random.Random) -> Image.Image:
    picture = STYLES[rng.choice(("flat", "neon", "ink"))](scene, PICTURE_PX)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(4, 9)))


def _noise(scene: Scene, rng: random.Random) -> Image.Image:
    """Noise of a random grain around a palette colour."""
    grain = rng.choice((4, 8, 16, 32, 64))
    generator = np.random.default_rng(rng.getrandbits(32))
    centre = np.array(PALETTE[scene.things[0].colour], np.float32)
    pixels = np.clip(centre + generator.normal(0, rng.uniform(30, 120), (grain, grain, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)


OtherMaker = Callable[[Scene, random.Random], Image.Image]
WRECK_MAKERS: tuple[OtherMaker, ...] = (_shuffled, _smeared, _noise)
OTHER_MAKERS: tuple[OtherMaker, ...] = (_half_styled, _coloured_ground, _another_style, *WRECK_MAKERS)


# ----------------------------------------------------------------------------------------------------- training


def train(data: JudgeData, seed: int) -> JudgeNetwork:
    """A one-cycle training of all pictures, each time moved by up to 4 pixels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = JudgeNetwork()
    steps = EPOCHS * (len(data.pictures) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(data.pictures), (BATCH_SIZE,), generator=generator)
        pictures = data.pictures[chosen].float() / 255
        dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
        pictures = functional.pad(pictures, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]
        kinds, styles = network(pictures)
        loss = functional.cross_entropy(kinds, data.kinds[chosen], label_smoothing=0.02)
        loss = loss + functional.cross_entropy(styles, data.styles[chosen], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            logger.info("step %d/%d  loss %.3f", step, steps, loss.item())
    return network


def report(judge: Judge, seed: int) -> None:
    """Log the accuracies on newly drawn, worsened pictures."""
    data = draw_data(NUM_TEST_PICTURES, seed)
    kinds, styles = judge.labels([Image.fromarray(p) for p in data.pictures.permute(0, 2, 3, 1).numpy()])
    kind_right = np.array([KINDS.index(kind) for kind in kinds]) == data.kinds.numpy()
    style_right = np.array([STYLE_LABELS.index(style) for style in styles]) == data.styles.numpy()
    for i, style in enumerate(STYLE_LABELS):
        of_style = data.styles.numpy() == i
        with_kind = of_style & (data.kinds.numpy() != NO_KIND)
        logger.info(
            "%s  style right %.1f %%  kind right %.1f %%",
            style, 100 * style_right[of_style].mean(), 100 * kind_right[with_kind].mean(),
        )  # fmt: skip
    rng = random.Random(seed)
    scenes = [random_single_scene(rng) for _ in range(NUM_TEST_PICTURES)]
    pixels = [np.asarray(STYLES["flat"](scene, PICTURE_PX)) for scene in scenes]
    pairs = list(zip(pixels, scenes, strict=True))
    colours = [object_colour(picture, scene.things[0].kind) == scene.things[0].colour for picture, scene in pairs]
    backgrounds = [background_colour(picture) == scene.background for picture, scene in pairs]
    logger.info("object colour right %.1f %%  background %.1f %%", 100 * np.mean(colours), 100 * np.mean(backgrounds))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    network = train(draw_data(NUM_PICTURES, seed=1), seed=1)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, WEIGHTS)
    logger.info("trained in %.0f s", time.monotonic() - start)
    report(Judge.load(), seed=2)


if __name__ == "__main__":
    main()
