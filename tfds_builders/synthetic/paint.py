"""Paints a scenario: textured, panning grounds in muted tones, large objects in full colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import PIL.Image

from tfds_builders.synthetic.scenario import FRAME_RATE, HEIGHT, WIDTH, Actor, Scenario, Shot

# How far an object strays from its home, in radii. Little enough that shot detection finds the
# cuts and nothing else: shots of like length keep a constant score, which gets the shortest shots
# chosen, from looking good.
_REACH = 0.4
_MARGIN = 36  # pixels by which a ground is larger than the picture, for panning

RGB = {
    "red": (225, 35, 35),
    "green": (30, 190, 50),
    "blue": (35, 80, 235),
    "yellow": (250, 215, 20),
    "purple": (165, 40, 200),
}
_GROUND_RGB = {
    "grass": (112, 124, 104),
    "sand": (176, 166, 146),
    "bricks": (140, 118, 112),
    "water": (104, 120, 132),
    "snow": (204, 206, 210),
    "planks": (122, 110, 98),
}


def frames(scenario: Scenario) -> Iterator[np.ndarray]:
    """All frames of the video in order, uint8[H, W, 3]."""
    for shot in scenario.shots:
        ground = _ground(shot)
        patches = [_patch(actor) for actor in shot.actors]
        for k in range(shot.end_frame - shot.start_frame):
            time_s = k / FRAME_RATE
            row = round(_MARGIN / 2 + _swing(shot.pan[0] * time_s, _MARGIN / 2))
            column = round(_MARGIN / 2 + _swing(shot.pan[1] * time_s, _MARGIN / 2))
            frame = ground[row : row + HEIGHT, column : column + WIDTH].copy()
            for actor, patch in zip(shot.actors, patches, strict=True):
                _paste(frame, patch, *_centre(actor, time_s))
            yield frame


def _swing(distance: float, limit: float) -> float:
    """Travels to and fro between -limit and limit, at 0 first: `_swing(5, 4)` is 3."""
    return limit - abs((distance + limit) % (4 * limit) - 2 * limit)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> np.ndarray:
    """float32[shape] in about [-1, 1], with blobs of about `cell` pixels."""
    grid = rng.uniform(-1, 1, (shape[0] // cell + 2, shape[1] // cell + 2)).astype(np.float32)
    image = PIL.Image.fromarray(grid).resize(
        (grid.shape[1] * cell, grid.shape[0] * cell), PIL.Image.Resampling.BICUBIC
    )
    return np.asarray(image)[: shape[0], : shape[1]]


def _ground(shot: Shot) -> np.ndarray:
    """A texture larger than the picture, uint8[H + margin, W + margin, 3]."""
    rng = np.random.default_rng(shot.texture_seed)
    shape = (HEIGHT + _MARGIN, WIDTH + _MARGIN)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    light = 0.10 * _smooth_noise(rng, shape, 40)
    fine = 0.06 * _smooth_noise(rng, shape, 3)
    match shot.ground:
        case "grass":
            light += 0.22 * _smooth_noise(rng, shape, 4)
        case "sand":
            light += 0.08 * np.sin(y / 5 + 2 * _smooth_noise(rng, shape, 24))
        case "bricks":
            across = (x + 12 * (y // 12 % 2)) % 24
            light += np.where((y % 12 < 2) | (across < 2), 0.25, 0.0)
        case "water":
            light += 0.20 * np.sin(y / 3 + 4 * _smooth_noise(rng, shape, 16))
        case "snow":
            light += 0.5 * fine
        case "planks":
            light += np.where(x % 20 < 2, -0.35, 0.0) + 0.10 * np.sin(x * 1.7)
    tone = np.array(_GROUND_RGB[shot.ground], np.float32) * rng.uniform(0.75, 1.1)
    tone += rng.uniform(-6, 6, 3)
    picture = tone * (1 + light + fine)[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class _Patch:
    rgb: np.ndarray  # uint8[S, S, 3]
    inside: np.ndarray  # bool[S, S]


def _patch(actor: Actor) -> _Patch:
    """The object's picture: its colour with a lighter top and a dark rim."""
    radius = actor.radius * HEIGHT
    half = int(np.ceil(radius)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    match actor.shape:
        case "ball":
            reach = np.hypot(x, y)
        case "box":
            reach = np.maximum(abs(x), abs(y)) / 0.86
        case "star":
            # Five points: the rim lies between 0.55 and 1 of the radius.
            angle = np.arctan2(x, -y)
            reach = np.hypot(x, y) / (0.775 + 0.225 * np.cos(5 * angle))
    colour = np.array(RGB[actor.colour], np.float32)
    shade = np.where(reach > 0.9, 0.55, 1.0 - 0.12 * y)[..., None]
    return _Patch(np.clip(colour * shade, 0, 255).astype(np.uint8), reach <= 1)


def _centre(actor: Actor, time_s: float) -> tuple[float, float]:
    """Row and column of the object's centre in pixels; the whole object stays in the picture."""
    radius = actor.radius * HEIGHT + 2
    reach = _REACH * radius
    top, bottom = radius + reach, HEIGHT - radius - reach
    left, right = actor.left * WIDTH + radius + reach, actor.right * WIDTH - radius - reach
    home_y, home_x = top + actor.home[0] * (bottom - top), left + actor.home[1] * (right - left)
    travelled = actor.speed * radius * time_s
    match actor.motion:
        case "drift":
            return home_y + _swing(0.5 * travelled, reach), home_x + _swing(travelled, reach)
        case "bounce":
            height = abs(np.sin(travelled / reach))
            return home_y + reach * (1 - 2 * height), home_x + _swing(0.4 * travelled, reach)
        case "circle":
            angle = travelled / reach
            return home_y + reach * np.sin(angle), home_x + reach * np.cos(angle)
    raise AssertionError(actor.motion)


def _paste(frame: np.ndarray, patch: _Patch, row: float, column: float) -> None:
    half = len(patch.inside) // 2
    top, left = round(row) - half, round(column) - half
    size = len(patch.inside)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + size, HEIGHT), min(left + size, WIDTH)
    inside = patch.inside[y0 - top : y1 - top, x0 - left : x1 - left]
    target = frame[y0:y1, x0:x1]
    target[inside] = patch.rgb[y0 - top : y1 - top, x0 - left : x1 - left][inside]
