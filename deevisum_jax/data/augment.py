"""Pictures changed a little for training: cropped, mirrored, tinted; what they show stays.

One change holds for all pictures of a segment, as if another camera had filmed it. Ranges follow
the field's habits (random resized crops after Szegedy et al., 2015), milder: a summary depends on
what is in the picture, and its edges belong to it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL.Image

MIN_AREA = 0.6  # of the picture, kept by a crop
MAX_ASPECT = 4 / 3  # of a crop's width to its height, relative to the picture's; and its inverse
TINT = 0.2  # brightness, contrast and colour are within 1 - TINT and 1 + TINT

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL's "L"
_MIDDLE = 127.5  # contrast is the distance from it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A change to a picture."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom
    mirrored: bool = False  # left to right
    brightness: float = 1.0  # factors; 1 changes nothing
    contrast: float = 1.0
    colour: float = 1.0  # 0 = gray

    def apply(
        self, image: PIL.Image.Image, size: int, resample: PIL.Image.Resampling
    ) -> np.ndarray:
        """`uint8[size, size, 3]`: the box of a picture, mirrored and tinted.

        A JPEG that is at least twice as large as needed is decoded at half the size, or less.
        """
        left, top, right, bottom = self.box
        # No effect on what is no JPEG, or is decoded already.
        image.draft("RGB", (round(size / (right - left)), round(size / (bottom - top))))
        width, height = image.size
        box = (left * width, top * height, right * width, bottom * height)
        if image.mode != "RGB":
            image = image.convert("RGB")
        picture = image.resize((size, size), resample, box).convert("RGB", self.tint())
        if self.mirrored:  # here, since numpy copies mirrored rows ten times slower
            picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(picture)

    def tint(self) -> tuple[float, ...]:
        """The 3 x 4 matrix, row by row, that changes RGB in one pass.

        Colour first, then contrast, then brightness: `b (c (k rgb + (1 - k) luma - m) + m)`.
        """
        to_rgb = self.colour * np.eye(3) + (1 - self.colour) * _LUMA
        offset = self.brightness * (1 - self.contrast) * _MIDDLE
        rows = self.brightness * self.contrast * to_rgb
        return tuple(np.column_stack([rows, np.full(3, offset)]).ravel().tolist())


def draw(rng: np.random.Generator) -> Augmentation:
    """A random change: uniform in area, place and tints, log-uniform in aspect, mirrored or not."""
    area = rng.uniform(MIN_AREA, 1.0)
    # No side may be longer than the picture's: area * aspect <= 1.
    limit = min(np.log(MAX_ASPECT), -np.log(area))
    aspect = np.exp(rng.uniform(-limit, limit))
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    brightness, contrast, colour = rng.uniform(1 - TINT, 1 + TINT, 3).tolist()
    return Augmentation(
        box=(left, top, left + width, top + height),
        mirrored=bool(rng.integers(2)),
        brightness=brightness,
        contrast=contrast,
        colour=colour,
    )
