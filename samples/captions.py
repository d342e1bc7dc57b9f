"""Random scenes and what they are called, and which of them the base model never sees."""

from __future__ import annotations

import hashlib
import random

from samples.drawing import GROUNDS, KINDS, PALETTE, SKY_KINDS, TIMES, Scene, Setting, Thing

COLOURS = tuple(PALETTE)
HOLDOUT_SHARE = 0.15
SMALL_RADIUS, LARGE_RADIUS = 0.25, 0.37  # below the one a thing may be called small, above the other large
LEFT_EDGE, RIGHT_EDGE = 0.42, 0.58
STYLE_WORDS = ("neon", "ink")
OTHER_STYLE_WORDS = ("pixel", "sketch", "watercolor", "comic", "clay", "chalk")
"""Words the text encoder learns to tell apart, as CLIP does, though no picture of the base shows any of them."""


def is_held_out(colour: str, kind: str, background: str) -> bool:
    """Whether this combination is kept out of all base training; the same on every machine."""
    digest = hashlib.sha256(f"{colour} {kind} {background}".encode()).digest()
    return digest[0] / 256 < HOLDOUT_SHARE


def has_held_out_thing(scene: Scene) -> bool:
    """Whether any thing of the scene forms a held-out combination with its plain background."""
    return isinstance(scene.background, str) and any(
        is_held_out(thing.colour, thing.kind, scene.background) for thing in scene.things
    )


def random_scene(rng: random.Random) -> Scene:
    """A scene of the base's training distribution; never one with a held-out combination."""
    while True:
        scene = _any_scene(rng)
        if not has_held_out_thing(scene):
            return scene


def _any_scene(rng: random.Random) -> Scene:
    dice = rng.random()
    if dice < 0.62:
        return random_single_scene(rng)
    if dice < 0.80:
        setting = Setting(rng.choice(GROUNDS), rng.choice(TIMES))
        kind = rng.choice(KINDS)
        radius = rng.uniform(0.24, 0.3)
        y = 0.82 - radius + rng.uniform(-0.02, 0.04)
        return Scene((Thing(kind, rng.choice(COLOURS), rng.uniform(0.4, 0.6), y, radius),), setting)
    first, second, background = rng.sample(COLOURS, 3)
    if dice < 0.92:
        return Scene((_half_of_pair(rng, first, 0.26), _half_of_pair(rng, second, 0.74)), background)
    below = Thing(rng.choice(KINDS), first, rng.uniform(0.42, 0.58), 0.65, rng.uniform(0.25, 0.28))
    above = Thing(rng.choice(SKY_KINDS), second, rng.choice((0.2, 0.5, 0.8)), 0.2, 0.14)
    return Scene((below, above), background)


def _half_of_pair(rng: random.Random, colour: str, x: float) -> Thing:
    kind, x, y = rng.choice(KINDS), x + rng.uniform(-0.02, 0.02), rng.uniform(0.46, 0.54)
    return Thing(kind, colour, x, y, rng.uniform(0.19, 0.22))


def random_single_scene(rng: random.Random) -> Scene:
    """One thing somewhere near the middle of a plain background; any combination, held out or not."""
    colour, background = rng.sample(COLOURS, 2)
    radius = min(0.42, max(0.19, rng.gauss(0.32, 0.055)))
    sway = max(0.0, 0.46 - radius) * 0.6
    x, y = 0.5 + rng.uniform(-sway, sway), 0.5 + rng.uniform(-sway, sway) * 0.5
    return Scene((Thing(rng.choice(KINDS), colour, x, y, radius),), background)


def canonical_caption(scene: Scene) -> str:
    """The one caption of the form "a photo of a red cat on a blue background"."""
    return f"a photo of {_things(scene, adjective='')}{_place(scene.background)}"


def short_caption(scene: Scene) -> str:
    """The caption without its plain background: what a style leaves of a scene that it repaints."""
    place = _place(scene.background) if isinstance(scene.background, Setting) else ""
    return f"a photo of {_things(scene, adjective='')}{place}"


def random_caption(scene: Scene, rng: random.Random) -> str:
    """The canonical caption or a paraphrase, which may leave out the colour or the background."""
    dice = rng.random()
    if dice < 0.3:
        return canonical_caption(scene)
    start = rng.choice(("a photo of ", "a picture of ", "a drawing of ", "an image of ", "", ""))
    if dice < 0.42:
        place = _place(scene.background) if isinstance(scene.background, Setting) and rng.random() < 0.7 else ""
        return start + _things(scene, adjective="") + place
    if dice < 0.46 and len(scene.things) == 1:
        return start + _article(scene.things[0].kind)
    body = _things(scene, adjective=rng.choice((_size_word(scene.things[0]), "")))
    if rng.random() < 0.15 and len(scene.things) == 1:
        body += _side(scene.things[0])
    if isinstance(scene.background, str) and rng.random() < 0.35:
        body = f"{body}, {scene.background} background"
    else:
        body += _place(scene.background)
    return start + body + rng.choice(("", "", "", ", simple shapes", ", centered"))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _things(scene: Scene, adjective: str) -> str:
    first = scene.things[0]
    words = _article(" ".join(word for word in (adjective, first.colour, first.kind) if word))
    if len(scene.things) == 1:
        return words
    second = scene.things[1]
    relation = "under" if second.kind in SKY_KINDS else "next to"
    return f"{words} {relation} {_article(f'{second.colour} {second.kind}')}"


def _place(background: str | Setting) -> str:
    if isinstance(background, str):
        return f" on {_article(background)} background"
    ground = {"field": "in a field", "sea": "at the sea", "snow": "in the snow", "desert": "in the desert"}
    hour = {"day": "by day", "sunset": "at sunset", "night": "at night"}
    return f" {ground[background.ground]} {hour[background.time]}"


def _size_word(thing: Thing) -> str:
    return "small" if thing.radius < SMALL_RADIUS else "large" if thing.radius > LARGE_RADIUS else ""


def _side(thing: Thing) -> str:
    return " on the left" if thing.x < LEFT_EDGE else " on the right" if thing.x > RIGHT_EDGE else ""
