"""Changes to pictures: what they are by hand, and what is drawn."""

import io

import numpy as np
import PIL.Image
import pytest

from deevisum_jax.data.augment import MAX_ASPECT, MIN_AREA, TINT, Augmentation, draw

BILINEAR = PIL.Image.Resampling.BILINEAR


def image(height: int = 8, width: int = 8) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(60, 190, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def test_no_change_is_the_picture_resized():
    picture = image(12, 8)
    np.testing.assert_array_equal(
        Augmentation().apply(picture, 6, BILINEAR), np.asarray(picture.resize((6, 6), BILINEAR))
    )


def test_a_box_of_whole_pixels_is_that_part_of_the_picture():
    picture = image()
    found = Augmentation(box=(0.25, 0.5, 0.75, 1.0)).apply(picture, 4, BILINEAR)
    np.testing.assert_array_equal(found, np.asarray(picture)[4:8, 2:6])
    mirrored = Augmentation(box=(0.25, 0.5, 0.75, 1.0), mirrored=True).apply(picture, 4, BILINEAR)
    np.testing.assert_array_equal(mirrored, found[:, ::-1])


def test_tints_by_their_formulas():
    picture = image()
    pixels = np.asarray(picture).astype(np.float64)
    gray = luma(pixels)[..., None]
    wanted = {
        Augmentation(brightness=0.8): 0.8 * pixels,
        Augmentation(contrast=1.2): 1.2 * (pixels - 127.5) + 127.5,
        Augmentation(colour=0.0): np.broadcast_to(gray, pixels.shape),
        Augmentation(brightness=1.1, contrast=0.9, colour=1.2): (
            1.1 * (0.9 * (1.2 * pixels - 0.2 * gray - 127.5) + 127.5)
        ),
    }
    for change, expected in wanted.items():
        found = change.apply(picture, 8, BILINEAR)
        np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.5 + 1e-3)


def test_what_is_too_bright_or_too_dark_stays_at_the_end_of_the_scale():
    white = PIL.Image.new("RGB", (4, 4), (255, 255, 255))
    assert (Augmentation(brightness=1.2).apply(white, 4, BILINEAR) == 255).all()
    assert (Augmentation(contrast=1.2).apply(PIL.Image.new("RGB", (4, 4)), 4, BILINEAR) == 0).all()


def test_a_large_jpeg_is_decoded_small_and_shows_the_same():
    smooth = image(5, 5).resize((256, 256), PIL.Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    smooth.save(stored, "JPEG", quality=95)
    change = Augmentation(box=(0.1, 0.0, 0.9, 0.8), mirrored=True)
    opened = PIL.Image.open(stored)
    found = change.apply(opened, 32, BILINEAR)
    assert opened.size == (64, 64)  # 32 / 0.8 = 40 pixels are wanted, and an eighth would be 32
    wanted = change.apply(smooth, 32, BILINEAR)
    np.testing.assert_allclose(found, wanted.astype(float), atol=6)


def test_a_picture_without_colour_becomes_one_with():
    gray = PIL.Image.new("L", (4, 4), 90)
    np.testing.assert_array_equal(Augmentation().apply(gray, 4, BILINEAR), 90)
    assert Augmentation().apply(gray, 4, BILINEAR).shape == (4, 4, 3)


def test_what_is_drawn_lies_in_its_ranges_and_fills_them():
    drawn = [draw(np.random.default_rng((0, place))) for place in range(2000)]
    left, top, right, bottom = np.array([change.box for change in drawn]).T
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 1 + 1e-12
    width, height = right - left, bottom - top
    assert MIN_AREA <= (width * height).min() < MIN_AREA + 0.01
    assert 0.99 < (width * height).max() <= 1
    aspect = width / height
    assert 1.3 < aspect.max() <= MAX_ASPECT + 1e-9
    assert 1 / MAX_ASPECT - 1e-9 <= aspect.min() < 1 / 1.3
    for name in ("brightness", "contrast", "colour"):
        values = np.array([getattr(change, name) for change in drawn])
        assert 1 - TINT <= values.min() < 1 - 0.9 * TINT
        assert 1 + 0.9 * TINT < values.max() <= 1 + TINT
    # Half of 2000, six standard deviations of 22 either way.
    assert sum(change.mirrored for change in drawn) == pytest.approx(1000, abs=134)


def test_the_same_key_draws_the_same():
    assert draw(np.random.default_rng((7, 3))) == draw(np.random.default_rng((7, 3)))
    assert draw(np.random.default_rng((7, 3))) != draw(np.random.default_rng((7, 4)))
    assert draw(np.random.default_rng((7, 3))) != draw(np.random.default_rng((8, 3)))
