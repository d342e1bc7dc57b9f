"""The fixed prompts and seeds by which the base and the style adapters are judged."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from samples.captions import COLOURS, STYLE_WORDS, canonical_caption, is_held_out, short_caption
from samples.drawing import GROUNDS, KINDS, TIMES, Scene, Setting, Thing

NUM_BASE_PROMPTS = 200
NUM_STYLE_PROMPTS = 64
NUM_DATASET_SCENES = 32
NUM_SINGLE, NUM_PAIRS = 22, 5  # of the data sets' scenes; the rest are landscapes
FIRST_SEED = 1000
DATASET_SEED = 33  # one at which no kind comes twice in the same colour


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its noise, and what the picture must show. A background of None is not asked for."""

    text: str
    seed: int
    kind: str
    colour: str
    background: str | None


def base_prompts() -> list[Prompt]:
    """200 prompts whose combination of colour, object and background the base has never seen; all kinds in turn."""
    rng = random.Random(200)
    combinations = [c for c in product(COLOURS, KINDS, COLOURS) if c[0] != c[2] and is_held_out(*c)]
    rng.shuffle(combinations)
    by_kind = [[c for c in combinations if c[1] == kind] for kind in KINDS]
    in_turn = [c for turn in zip_longest(*by_kind) for c in turn if c is not None]
    return [
        Prompt(canonical_caption(Scene((Thing(kind, colour),), background)), FIRST_SEED + i, kind, colour, background)
        for i, (colour, kind, background) in enumerate(in_turn[:NUM_BASE_PROMPTS])
    ]


def style_prompts(style: str) -> list[Prompt]:
    """64 prompts for an adapter trained on `samples/neon` or `samples/ink`: every kind four times, each time in a
    colour that it does not have in the data set, and every colour about equally often.
    """
    used = {(thing.kind, thing.colour) for scene in dataset_scenes() for thing in scene.things}
    rng = random.Random(64)
    counts = dict.fromkeys(COLOURS, 0)
    prompts = []
    for i in range(NUM_STYLE_PROMPTS):
        kind = KINDS[i % len(KINDS)]
        free = [colour for colour in COLOURS if (kind, colour) not in used]
        colour = min(rng.sample(free, len(free)), key=counts.__getitem__)
        used.add((kind, colour))
        counts[colour] += 1
        scene = Scene((Thing(kind, colour),), "gray")  # the short caption does not name the background
        prompts.append(Prompt(style_caption(scene, style), FIRST_SEED + i, kind, colour, None))
    return prompts


def style_caption(scene: Scene, style: str) -> str:
    """The caption of a data set's picture: what is drawn, then the trigger. The background is left out, because it
    is a part of the style.
    """
    if style not in STYLE_WORDS:
        raise ValueError(f"There is no data set in the style {style!r}; choose one of {', '.join(STYLE_WORDS)}.")
    return f"{short_caption(scene)}, {style} style"


def dataset_scenes() -> list[Scene]:
    """The 32 scenes of both data sets: every kind at least twice, every colour three times or four."""
    rng = random.Random(DATASET_SEED)
    kinds = _shuffled_rounds(KINDS, rng)
    colours = _shuffled_rounds(COLOURS, rng)
    scenes: list[Scene] = []
    for i in range(NUM_DATASET_SCENES):
        if i < NUM_SINGLE:
            x, y, radius = rng.uniform(0.46, 0.54), rng.uniform(0.47, 0.53), rng.uniform(0.3, 0.37)
            scenes.append(_on_another_colour(i, Thing(next(kinds), next(colours), x, y, radius)))
        elif i < NUM_SINGLE + NUM_PAIRS:
            left = Thing(next(kinds), next(colours), 0.26, rng.uniform(0.47, 0.53), 0.21)
            right = Thing(next(kinds), next(colours), 0.74, rng.uniform(0.47, 0.53), 0.21)
            scenes.append(_on_another_colour(i, left, right))
        else:
            setting = Setting(GROUNDS[i % len(GROUNDS)], TIMES[i % len(TIMES)])
            scenes.append(Scene((Thing(next(kinds), next(colours), 0.5, 0.56, 0.27),), setting))
    return scenes


def _on_another_colour(i: int, *things: Thing) -> Scene:
    """The things before a background of the i-th colour that none of them has; no style of a data set shows it."""
    used = {thing.colour for thing in things}
    free = [colour for colour in COLOURS if colour not in used]
    return Scene(things, free[i % len(free)])


def _shuffled_rounds(items: Sequence[str], rng: random.Random) -> Iterator[str]:
    """All items in random order, again and again."""
    while True:
        yield from rng.sample(items, len(items))
