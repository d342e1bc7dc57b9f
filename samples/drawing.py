"""What a sample picture contains (`Scene`) and the polygons it is made of (`Part`).

Coordinates are fractions of the picture: x to the right, y down, the whole picture is [0, 1] x [0, 1]. How parts turn
into pixels is a matter of style and lives in `styles.py`; what a scene is called lives in `captions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Rgb = tuple[int, int, int]
Point = tuple[float, float]
Tone = Literal["body", "light", "dark"]

PALETTE: dict[str, Rgb] = {
    "red": (217, 38, 38),
    "orange": (250, 138, 22),
    "yellow": (250, 216, 44),
    "green": (38, 150, 62),
    "blue": (36, 94, 214),
    "cyan": (72, 204, 220),
    "purple": (132, 56, 172),
    "pink": (255, 146, 190),
    "brown": (128, 78, 40),
    "black": (26, 26, 32),
    "gray": (146, 146, 152),
    "white": (250, 250, 246),
}

GROUNDS = ("field", "sea", "snow", "desert")
TIMES = ("day", "sunset", "night")

GLASS: Rgb = (196, 228, 246)
WOOD: Rgb = (120, 72, 36)
CHARCOAL: Rgb = (40, 40, 46)
LEAF: Rgb = (70, 170, 70)
CREAM: Rgb = (246, 232, 204)

SKY_COLOURS: dict[str, Rgb] = {"day": (134, 200, 246), "sunset": (250, 156, 96), "night": (24, 24, 72)}
GROUND_COLOURS: dict[str, Rgb] = {
    "field": (112, 188, 84),
    "sea": (40, 118, 186),
    "snow": (240, 244, 250),
    "desert": (234, 200, 132),
}


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` is its centre and `radius` half its extent."""

    kind: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.33


@dataclass(frozen=True)
class Setting:
    """A landscape that takes the place of a plain background."""

    ground: str
    time: str


@dataclass(frozen=True)
class Scene:
    """The things of a picture, the one it is mainly about first, before a palette colour or a landscape."""

    things: tuple[Thing, ...]
    background: str | Setting


@dataclass(frozen=True)
class Part:
    """One filled polygon. `tone` tells the colourless styles whether it is a body, a light or a dark detail."""

    points: tuple[Point, ...]
    fill: Rgb
    tone: Tone = "body"


def scene_parts(scene: Scene) -> list[Part]:
    """All polygons of the scene's things, back to front, in picture coordinates (without the background)."""
    parts: list[Part] = []
    for thing in scene.things:
        for part in SHAPES[thing.kind](PALETTE[thing.colour]):
            points = tuple((thing.x + thing.radius * x, thing.y + thing.radius * y) for x, y in part.points)
            parts.append(Part(points, part.fill, part.tone))
    return parts


def background_parts(background: str | Setting) -> tuple[Rgb, list[Part]]:
    """The colour behind everything and the polygons of the landscape, if there is one."""
    if isinstance(background, str):
        return PALETTE[background], []
    parts: list[Part] = []
    if background.time == "night":
        parts += [Part(_star(x, y, 0.022), CREAM, "light") for x, y in _NIGHT_STARS]
        parts.append(Part(_crescent(0.82, 0.17, 0.1), CREAM, "light"))
    elif background.time == "day":
        parts.append(Part(_ellipse(0.83, 0.16, 0.1, 0.1), (255, 224, 92), "light"))
        parts.append(Part(_cloud(0.2, 0.16, 0.15), (250, 252, 255), "light"))
    else:
        parts.append(Part(_ellipse(0.8, 0.62, 0.13, 0.13), (255, 222, 110), "light"))
    parts.append(Part(_ground(background.ground), ground_colour(background), "light"))
    return SKY_COLOURS[background.time], parts


def ground_colour(setting: Setting) -> Rgb:
    """The ground's colour as the hour tints it."""
    ground = GROUND_COLOURS[setting.ground]
    if setting.time == "night":
        return mix(ground, SKY_COLOURS["night"], 0.5)
    if setting.time == "sunset":
        return mix(ground, SKY_COLOURS["sunset"], 0.25)
    return ground


def mix(colour: Rgb, other: Rgb, share: float) -> Rgb:
    """`colour` with `share` of `other`, share in [0, 1]."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def shade(colour: Rgb) -> Rgb:
    """A darker neighbour of the colour for roofs and wings; of a very dark colour, a lighter one."""
    return mix(colour, (255, 255, 255), 0.28) if max(colour) < 60 else mix(colour, (20, 12, 30), 0.3)


def tint(colour: Rgb) -> Rgb:
    """A much lighter neighbour of the colour; of white, a light gray, to stay visible."""
    return mix(colour, (90, 90, 110), 0.3) if min(colour) > 235 else mix(colour, (255, 255, 255), 0.6)


# ------------------------------------------------------------------------------------------------- outlines


TURN = 2 * math.pi


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = TURN) -> tuple[Point, ...]:
    steps = max(8, round(32 * abs(stop - start) / TURN))
    closed = abs(stop - start) >= TURN - 1e-6
    angles = [start + (stop - start) * i / steps for i in range(steps if closed else steps + 1)]
    return tuple((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles)


def _box(left: float, top: float, right: float, bottom: float) -> tuple[Point, ...]:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _polar(x: float, y: float, radius: Callable[[float], float], steps: int = 60) -> tuple[Point, ...]:
    """The closed curve at distance `radius(angle)` from (x, y); angle 0 points up."""
    angles = [2 * math.pi * i / steps for i in range(steps)]
    return tuple((x + radius(a) * math.sin(a), y - radius(a) * math.cos(a)) for a in angles)


def _star(x: float, y: float, radius: float, waist: float = 0.43) -> tuple[Point, ...]:
    return _polar(x, y, lambda a: radius * (1.0 if round(a * 5 / math.pi) % 2 == 0 else waist), steps=10)


def _crescent(x: float, y: float, radius: float) -> tuple[Point, ...]:
    inner = 0.86 * radius
    outside = _ellipse(x, y, radius, radius, math.radians(-70), math.radians(160))
    inside = _ellipse(x - 0.42 * radius, y - 0.26 * radius, inner, inner, math.radians(142), math.radians(-52))
    return outside + inside


def _cloud(x: float, y: float, width: float) -> tuple[Point, ...]:
    top = [
        *_ellipse(x - 0.6 * width, y, 0.4 * width, 0.26 * width, math.pi * 0.9, math.pi * 1.6),
        *_ellipse(x, y - 0.12 * width, 0.5 * width, 0.42 * width, math.pi * 1.15, math.pi * 1.85),
        *_ellipse(x + 0.6 * width, y, 0.4 * width, 0.26 * width, math.pi * 1.4, math.pi * 2.1),
    ]
    return (*top, (x + 0.9 * width, y + 0.22 * width), (x - 0.9 * width, y + 0.22 * width))


def _ground(ground: str) -> tuple[Point, ...]:
    """Everything below the horizon; the line tells the grounds apart even without colour."""
    height, waves = {"field": (0.035, 1.0), "sea": (0.015, 4.0), "snow": (0.05, 1.5), "desert": (0.06, 0.75)}[ground]
    line = [(i / 48, 0.66 + height * math.sin(2 * math.pi * waves * i / 48 + 0.6)) for i in range(-2, 51)]
    return (*line, (1.05, 1.05), (-0.05, 1.05))


_NIGHT_STARS = ((0.1, 0.12), (0.3, 0.06), (0.47, 0.17), (0.62, 0.07), (0.17, 0.34), (0.93, 0.4))


# --------------------------------------------------------------------------- objects, within [-1, 1] x [-1, 1]


def _circle(colour: Rgb) -> list[Part]:
    return [Part(_ellipse(0, 0, 0.86, 0.86), colour)]


def _square(colour: Rgb) -> list[Part]:
    return [Part(_box(-0.76, -0.76, 0.76, 0.76), colour)]


def _triangle(colour: Rgb) -> list[Part]:
    return [Part(((0, -0.88), (0.96, 0.78), (-0.96, 0.78)), colour)]


def _five_pointed_star(colour: Rgb) -> list[Part]:
    return [Part(_star(0, 0.06, 1.02), colour)]


def _heart(colour: Rgb) -> list[Part]:
    points = []
    for i in range(48):
        a = 2 * math.pi * i / 48
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((math.sin(a) ** 3 * 0.95, -y / 17 - 0.08))
    return [Part(tuple(points), colour)]


def _house(colour: Rgb) -> list[Part]:
    return [
        Part(_box(0.36, -0.86, 0.6, -0.3), shade(colour)),
        Part(_box(-0.72, -0.14, 0.72, 0.9), colour),
        Part(((-0.98, -0.1), (0, -0.95), (0.98, -0.1)), shade(colour)),
        Part(_box(-0.17, 0.32, 0.17, 0.9), WOOD, "dark"),
        Part(_box(-0.56, 0.1, -0.26, 0.42), GLASS, "light"),
        Part(_box(0.26, 0.1, 0.56, 0.42), GLASS, "light"),
    ]


def _tree(colour: Rgb) -> list[Part]:
    crown = _polar(0, -0.24, lambda a: 0.6 + 0.14 * abs(math.sin(2.5 * a + math.pi / 2)))
    return [Part(_box(-0.14, 0.25, 0.14, 0.97), WOOD, "dark"), Part(crown, colour)]


def _car(colour: Rgb) -> list[Part]:
    rear, front = ((-0.98, 0.42), (-0.98, 0.06), (-0.62, -0.04)), ((0.64, -0.04), (0.98, 0.1), (0.98, 0.42))
    shell = (*rear, (-0.36, -0.5), (0.34, -0.5), *front)
    wheels = [Part(_ellipse(x, 0.42, 0.26, 0.26), CHARCOAL, "dark") for x in (-0.52, 0.52)]
    hubs = [Part(_ellipse(x, 0.42, 0.1, 0.1), (214, 214, 220), "light") for x in (-0.52, 0.52)]
    return [
        Part(shell, colour),
        Part(((-0.44, -0.04), (-0.26, -0.37), (-0.05, -0.37), (-0.05, -0.04)), GLASS, "light"),
        Part(((0.08, -0.04), (0.08, -0.37), (0.26, -0.37), (0.44, -0.04)), GLASS, "light"),
        *wheels,
        *hubs,
    ]


def _cat(colour: Rgb) -> list[Part]:
    cheeks = _ellipse(0, 0.14, 0.8, 0.72, math.radians(-38), math.radians(218))
    head = (*cheeks, (-0.72, -0.94), (-0.26, -0.54), (0.26, -0.54), (0.72, -0.94))
    eyes = [Part(_ellipse(x, 0.02, 0.17, 0.22), (250, 250, 226), "light") for x in (-0.34, 0.34)]
    pupils = [Part(_ellipse(x, 0.04, 0.08, 0.17), CHARCOAL, "dark") for x in (-0.34, 0.34)]
    nose = Part(((-0.14, 0.36), (0.14, 0.36), (0, 0.54)), (238, 110, 130), "dark")
    return [Part(head, colour), *eyes, *pupils, nose]


def _flower(colour: Rgb) -> list[Part]:
    heart = (250, 138, 22) if colour == PALETTE["yellow"] else (255, 214, 64)
    return [
        Part(_box(-0.07, 0.1, 0.07, 0.98), LEAF, "dark"),
        Part(((0.05, 0.86), (0.24, 0.52), (0.66, 0.44), (0.5, 0.76)), LEAF, "dark"),
        Part(_polar(0, -0.34, lambda a: 0.44 + 0.18 * math.cos(6 * a)), colour),
        Part(_ellipse(0, -0.34, 0.2, 0.2), heart, "light"),
    ]


def _fish(colour: Rgb) -> list[Part]:
    return [
        Part(((0.38, 0), (0.96, -0.5), (0.82, 0), (0.96, 0.5)), shade(colour)),
        Part(((-0.34, -0.36), (0.02, -0.74), (0.34, -0.28)), shade(colour)),
        Part(_ellipse(-0.22, 0, 0.76, 0.46), colour),
        Part(_ellipse(-0.58, -0.1, 0.15, 0.15), (252, 252, 252), "light"),
        Part(_ellipse(-0.58, -0.1, 0.07, 0.07), CHARCOAL, "dark"),
    ]


def _boat(colour: Rgb) -> list[Part]:
    return [
        Part(_box(-0.05, -0.95, 0.05, 0.4), WOOD, "dark"),
        Part(((0.12, -0.88), (0.82, 0.24), (0.12, 0.24)), tint(colour), "light"),
        Part(((-0.12, -0.6), (-0.12, 0.24), (-0.66, 0.24)), tint(colour), "light"),
        Part(((-0.98, 0.36), (0.98, 0.36), (0.62, 0.88), (-0.62, 0.88)), colour),
    ]


def _mushroom(colour: Rgb) -> list[Part]:
    spots = ((-0.46, -0.22, 0.14), (0.06, -0.5, 0.17), (0.5, -0.16, 0.13))
    return [
        Part(((-0.24, 0.0), (0.24, 0.0), (0.34, 0.92), (-0.34, 0.92)), CREAM, "light"),
        Part(_ellipse(0, 0.1, 0.95, 0.98, math.pi, TURN), colour),
        *[Part(_ellipse(x, y, r, r), (252, 250, 240), "light") for x, y, r in spots],
    ]


def _umbrella(colour: Rgb) -> list[Part]:
    hook = (*_ellipse(0.17, 0.72, 0.24, 0.24, math.pi, 0), *_ellipse(0.17, 0.72, 0.1, 0.1, 0, math.pi))
    scallops: list[Point] = []
    for centre in (0.64, 0.0, -0.64):
        scallops += _ellipse(centre, 0.08, 0.32, 0.16, TURN, math.pi)
    canopy = (*_ellipse(0, 0.08, 0.96, 0.96, math.pi, TURN), *scallops)
    middle = (*_ellipse(0, 0.08, 0.32, 0.96, math.pi, TURN), *_ellipse(0, 0.08, 0.32, 0.16, TURN, math.pi))
    return [
        Part(_box(-0.07, -0.1, 0.07, 0.74), WOOD, "dark"),
        Part(hook, WOOD, "dark"),
        Part(canopy, colour),
        Part(middle, shade(colour)),
    ]


def _cup(colour: Rgb) -> list[Part]:
    handle = (
        *_ellipse(0.5, 0.18, 0.46, 0.42, -math.pi / 2, math.pi / 2),
        *_ellipse(0.5, 0.18, 0.24, 0.2, math.pi / 2, -math.pi / 2),
    )
    return [
        Part(handle, shade(colour)),
        Part(((-0.74, -0.5), (0.58, -0.5), (0.42, 0.8), (-0.58, 0.8)), colour),
        Part(_ellipse(-0.08, -0.5, 0.66, 0.2), CREAM, "light"),
        Part(_ellipse(-0.08, -0.48, 0.5, 0.12), WOOD, "dark"),
    ]


def _bird(colour: Rgb) -> list[Part]:
    legs = [Part(_box(x - 0.05, 0.5, x + 0.05, 0.95), WOOD, "dark") for x in (-0.18, 0.14)]
    return [
        *legs,
        Part(((0.4, 0.06), (1.0, -0.34), (0.92, 0.22), (0.5, 0.4)), shade(colour)),
        Part(((-0.74, -0.5), (-1.02, -0.32), (-0.7, -0.2)), (250, 150, 40), "dark"),
        Part(_ellipse(-0.44, -0.4, 0.38, 0.38), colour),
        Part(_ellipse(0, 0.14, 0.62, 0.5), colour),
        Part(_ellipse(0.14, 0.1, 0.34, 0.24), shade(colour)),
        Part(_ellipse(-0.54, -0.46, 0.12, 0.12), (252, 252, 252), "light"),
        Part(_ellipse(-0.55, -0.46, 0.06, 0.06), CHARCOAL, "dark"),
    ]


def _sun(colour: Rgb) -> list[Part]:
    rays = _polar(0, 0, lambda a: 1.0 if round(a * 12 / math.pi) % 2 == 0 else 0.72, steps=24)
    return [Part(rays, colour)]


def _moon(colour: Rgb) -> list[Part]:
    return [Part(_crescent(0, 0, 0.95), colour)]


SHAPES: dict[str, Callable[[Rgb], Sequence[Part]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _five_pointed_star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "cat": _cat,
    "flower": _flower,
    "fish": _fish,
    "boat": _boat,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
    "cup": _cup,
    "bird": _bird,
    "sun": _sun,
    "moon": _moon,
}

SKY_KINDS = ("sun", "moon")
"""Only ever drawn above another thing."""
KINDS = tuple(kind for kind in SHAPES if kind not in SKY_KINDS)
