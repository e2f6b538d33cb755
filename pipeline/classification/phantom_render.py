"""Drawn insects on drawn leaves: pose, light, depth of field and grain of a photograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pipeline.classification.phantom_body import BODIES, Body, Part, legs_of
from pipeline.classification.phantom_traits import COLOURS, Traits

__all__ = ["photograph"]

Points = NDArray[np.float64]
Colour = tuple[float, float, float]

_FINER = 2  # what is drawn, over what is returned: edges come out smooth
_LAYERS = 7  # of shading on a part
_GROUNDS: tuple[tuple[Colour, Colour], ...] = (
    ((58, 92, 40), (104, 140, 66)),  # leaves behind
    ((92, 72, 50), (142, 116, 84)),  # soil
    ((120, 128, 108), (176, 180, 158)),  # stone
    ((74, 60, 44), (118, 104, 78)),  # bark
)


@dataclass(frozen=True)
class _Pose:
    """Where an insect sits: its frame in the picture, in pixels of the drawing."""

    centre: tuple[float, float]
    scale: float
    angle: float
    squash: float
    bend: float

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        x, y = points[:, 0], points[:, 1] + self.bend * points[:, 0] ** 2
        y = y * self.squash
        c, s = np.cos(self.angle), np.sin(self.angle)
        across = self.centre[0] + self.scale * (c * x - s * y)
        down = self.centre[1] + self.scale * (s * x + c * y)
        return list(zip(across.tolist(), down.tolist(), strict=True))


def photograph(rng: np.random.Generator, traits: Traits, size_px: int) -> NDArray[np.uint8]:
    """Return a picture `(size_px, size_px, 3)` of an insect with these traits."""
    side = _FINER * size_px
    picture = _ground(rng, side)
    body = BODIES[traits.build]
    pose = _pose(rng, body, side)
    insect = _insect(rng, traits, body, pose, side)
    shadow = insect.getchannel("A").filter(ImageFilter.GaussianBlur(0.012 * side))
    right, down = (int(step) for step in rng.uniform(-0.03, 0.03, 2) * side)
    moved = Image.new("L", picture.size)
    moved.paste(shadow.point(lambda value: int(0.45 * value)), (right, down))
    picture.paste((18, 20, 14), mask=moved)
    picture.paste(insect, mask=insect.getchannel("A"))
    if rng.random() < 0.25:
        _blade(rng, picture, pose)
    return _develop(rng, picture.reduce(_FINER))


def _pose(rng: np.random.Generator, body: Body, side: int) -> _Pose:
    share = float(rng.uniform(0.48, 0.85))
    off = rng.uniform(-0.5, 0.5, 2) * (1 - share) * 0.8
    return _Pose(
        centre=(side * (0.5 + float(off[0])), side * (0.5 + float(off[1]))),
        scale=share * side * 0.92,
        angle=float(rng.uniform(0, 2 * np.pi)),
        squash=float(rng.uniform(0.85, 1.0)),
        bend=float(rng.uniform(-1, 1)) * body.bend,
    )


def _insect(
    rng: np.random.Generator, traits: Traits, body: Body, pose: _Pose, side: int
) -> Image.Image:
    """Draw the insect on a transparent ground."""
    layer = Image.new("RGBA", (side, side))
    base, mark = (_varied(rng, colour) for colour in COLOURS[traits.colour])
    _limbs(rng, layer, body, pose, 1.5 if traits.long_legs else 0.95, _toned(base, 0.42))
    light = float(rng.uniform(0, 2 * np.pi)) - pose.angle
    proportion = float(rng.uniform(0.9, 1.1))
    for part in body.parts:
        tone = _toned(base, part.tone)
        canvas = layer if part.opacity == 1 else Image.new("RGBA", layer.size)
        draw = ImageDraw.Draw(canvas)
        outline = part.outline(low=-proportion, high=proportion)
        draw.polygon(pose.pixels(outline), fill=_rgba(tone))
        if part.patterned:
            _pattern(draw, traits.pattern, part, pose, mark)
            for ring in np.linspace(-0.85, 0.85, body.segments):
                band = part.outline(ring - 0.012, ring + 0.012)
                draw.polygon(pose.pixels(band), fill=_rgba(_toned(base, 0.5)))
        canvas.alpha_composite(_shading(part, outline, pose, light, layer.size))
        if canvas is not layer:
            _veins(draw, part, pose)
            thin = canvas.getchannel("A").point(lambda v, o=part.opacity: int(o * v))
            canvas.putalpha(thin)
            layer.alpha_composite(canvas)
    draw = ImageDraw.Draw(layer)
    if body.seam:
        line = np.array([[0.2, 0.0], [-0.49, 0.0]])
        draw.line(pose.pixels(line), fill=_rgba(_toned(base, 0.35)), width=_pen(pose, 0.012))
    _eyes(draw, body, pose)
    return layer


def _limbs(
    rng: np.random.Generator,
    layer: Image.Image,
    body: Body,
    pose: _Pose,
    length: float,
    colour: Colour,
) -> None:
    """Draw legs and antennae, which lie below the body."""
    draw = ImageDraw.Draw(layer)
    for side in (1, -1):
        for line in legs_of(body, side, length, rng.normal(0, 0.12, max(len(body.legs), 1))):
            width = _pen(pose, 0.026)
            draw.line(pose.pixels(line), fill=_rgba(colour), width=width, joint="curve")
            draw.line(pose.pixels(line[:2]), fill=_rgba(colour), width=round(1.5 * width))
        reach = body.antennae * length
        along = np.linspace(0, 1, 8)
        spread = side * (0.03 + reach * (0.75 + float(rng.normal(0, 0.12))) * along**1.4)
        feeler = np.stack([body.head - 0.02 + 0.8 * reach * along, spread], axis=1)
        draw.line(pose.pixels(feeler), fill=_rgba(colour), width=_pen(pose, 0.014), joint="curve")


def _shading(
    part: Part, outline: Points, pose: _Pose, light: float, size: tuple[int, int]
) -> Image.Image:
    """Return what makes a part look round: dark at its edge, bright where it faces the light."""
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    middle = (np.asarray(part.start) + np.asarray(part.end)) / 2
    towards = part.width * np.array([np.cos(light), np.sin(light)])
    for step, value in enumerate(np.linspace(-95, 85, _LAYERS)):
        share = step / _LAYERS
        points = middle + (outline - middle) * (1 - 0.9 * share) + 0.35 * share * towards
        tone = 255 if value > 0 else 0
        draw.polygon(pose.pixels(points), fill=(tone, tone, tone, abs(int(value))))
    return layer


def _pattern(
    draw: ImageDraw.ImageDraw, pattern: str, part: Part, pose: _Pose, colour: Colour
) -> None:
    """Draw a class's marks on a part."""
    fill = _rgba(colour)
    if pattern == "banded":
        for place in (-0.62, -0.12, 0.38):
            draw.polygon(pose.pixels(part.outline(place, place + 0.24)), fill=fill)
    elif pattern == "lined":
        for low, high in ((-0.62, -0.34), (0.34, 0.62)):
            draw.polygon(pose.pixels(part.outline(-0.9, 0.9, low, high)), fill=fill)
    elif pattern == "two-toned":
        draw.polygon(pose.pixels(part.outline(-1.0, -0.1)), fill=fill)
    elif pattern == "spotted":
        turn = np.linspace(0, 2 * np.pi, 13)
        long = float(np.hypot(*(np.asarray(part.end) - np.asarray(part.start)))) / 2
        for along in (-0.55, 0.0, 0.5):
            for across in (-0.5, 0.5):
                centre = part.points(np.array([along]), np.array([across]))
                radius = 0.27 * min(part.width, long)
                ring = centre + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
                draw.polygon(pose.pixels(ring), fill=fill)


def _veins(draw: ImageDraw.ImageDraw, part: Part, pose: _Pose) -> None:
    for across in (-0.95, -0.35, 0.25, 0.95):
        along = np.linspace(-0.95, 0.9, 9)
        line = part.points(along, np.full(9, across))
        draw.line(pose.pixels(line), fill=(60, 52, 40, 255), width=_pen(pose, 0.008))


def _eyes(draw: ImageDraw.ImageDraw, body: Body, pose: _Pose) -> None:
    head = body.parts[-1] if body.parts[-1].start[0] > 0.1 else body.parts[0]
    turn = np.linspace(0, 2 * np.pi, 11)
    for side in (-1, 1):
        centre = head.points(np.array([0.25]), np.array([0.72 * side]))
        ring = centre + 0.32 * head.width * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        draw.polygon(pose.pixels(ring), fill=(22, 16, 18, 255))


def _ground(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw what lies behind: out of focus, with the leaf the insect sits on before it."""
    dark, bright = (np.asarray(c) for c in _GROUNDS[int(rng.integers(len(_GROUNDS)))])
    mottled = sum(_noise(rng, side, cells) / weight for cells, weight in ((4, 1), (12, 2), (40, 4)))
    level = np.clip(0.5 + 0.5 * np.asarray(mottled), 0, 1)[..., None]
    picture = Image.fromarray((dark + (bright - dark) * level).astype(np.uint8))
    for _ in range(int(rng.integers(1, 4))):
        _leaf(rng, picture, float(rng.uniform(0.35, 0.8)))
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.004, 0.025)) * side))
    if rng.random() < 0.7:
        _leaf(rng, picture, float(rng.uniform(0.9, 1.4)), on_top=True)
    return picture


def _leaf(
    rng: np.random.Generator, picture: Image.Image, length: float, on_top: bool = False
) -> None:
    """Draw a leaf with a midrib and side veins; `on_top` puts it into the middle."""
    side = picture.size[0]
    spread = 0.12 if on_top else 0.5
    centre = side * (0.5 + rng.uniform(-spread, spread, 2))
    broad = float(rng.uniform(0.24, 0.4)) * length
    pose = _Pose((float(centre[0]), float(centre[1])), side, float(rng.uniform(0, 2 * np.pi)), 1, 0)
    blade = Part((-length / 2, 0), (length / 2, 0), broad, lambda x: (1 - x**2) * (1.1 - 0.25 * x))
    green = np.array([rng.uniform(60, 130), rng.uniform(110, 165), rng.uniform(35, 80)])
    colour: Colour = (float(green[0]), float(green[1]), float(green[2]))
    draw = ImageDraw.Draw(picture)
    draw.polygon(pose.pixels(blade.outline()), fill=_rgba(_toned(colour, 0.8)))
    draw.polygon(pose.pixels(blade.outline(high=0.0)), fill=_rgba(colour))
    vein = _rgba(_toned(colour, 1.25))
    for place in np.linspace(-0.8, 0.7, 9):
        for across in (-0.85, 0.85):
            rib = blade.points(np.array([place, place + 0.22]), np.array([0.0, across]))
            draw.line(pose.pixels(rib), fill=vein, width=max(round(0.004 * side), 1))
    spine = np.array([[-0.5 * length, 0.0], [0.5 * length, 0.0]])
    draw.line(pose.pixels(spine), fill=vein, width=max(round(0.011 * side), 1))


def _blade(rng: np.random.Generator, picture: Image.Image, pose: _Pose) -> None:
    """Draw a blade of grass across a part of the insect."""
    side = picture.size[0]
    across = float(rng.uniform(-0.35, 0.35))
    grass = _Pose(
        (pose.centre[0] + across * pose.scale, pose.centre[1]),
        side, float(rng.uniform(1.0, 2.1)), 1, float(rng.uniform(-0.15, 0.15)),
    )  # fmt: skip
    blade = Part((-1.2, 0), (1.2, 0), float(rng.uniform(0.015, 0.035)))
    colour = (rng.uniform(70, 130), rng.uniform(120, 170), rng.uniform(40, 80))
    draw = ImageDraw.Draw(picture)
    draw.polygon(grass.pixels(blade.outline()), fill=_rgba(_toned(colour, 0.75)))
    draw.polygon(grass.pixels(blade.outline(high=0.1)), fill=_rgba(colour))


def _develop(rng: np.random.Generator, picture: Image.Image) -> NDArray[np.uint8]:
    """Return what a camera makes of the scene: light, white balance, sharpness and grain."""
    side = picture.size[0]
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.1, 0.01 * side))))
    ramp = np.linspace(-1, 1, side)
    angle = float(rng.uniform(0, 2 * np.pi))
    slope = ramp[None, :] * np.cos(angle) + ramp[:, None] * np.sin(angle)
    light = 1 + float(rng.uniform(0, 0.25)) * slope + 0.12 * _noise(rng, side, 3)
    balance = rng.normal(1, 0.06, 3)
    values = np.asarray(picture, np.float64) * light[..., None] * balance
    values = 255 * np.clip(values * float(rng.uniform(0.75, 1.2)) / 255, 0, 1) ** rng.uniform(
        0.8, 1.25
    )
    values += rng.normal(0, float(rng.uniform(1, 7)), values.shape)
    developed: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return developed


def _noise(rng: np.random.Generator, side: int, cells: int) -> NDArray[np.float64]:
    """Return smooth noise `(side, side)` around 0, `cells` hills across."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), float)


def _varied(rng: np.random.Generator, colour: Colour | tuple[int, int, int]) -> Colour:
    red, green, blue = np.asarray(colour, float) * rng.normal(1, 0.07) + rng.normal(0, 7, 3)
    return float(red), float(green), float(blue)


def _toned(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _rgba(colour: Colour) -> tuple[int, int, int, int]:
    red, green, blue = (int(np.clip(value, 0, 255)) for value in colour)
    return red, green, blue, 255


def _pen(pose: _Pose, width: float) -> int:
    return max(round(width * pose.scale), 1)
