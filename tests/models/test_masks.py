"""Masks and positions, by hand."""

import numpy as np
import pytest

from deevisum_jax.models import masks


def rows(*lines):
    return np.array([[c == "1" for c in line] for line in lines])


def row(line):
    return rows(line)


def test_prefix_sees_itself_and_suffix_is_causal():
    mask = masks.make_attn_mask(row("0000111"), row("1111110"))
    np.testing.assert_array_equal(
        mask[0],
        rows("1111000", "1111000", "1111000", "1111000", "1111100", "1111110", "1111110"),
    )


def test_pads_in_front_of_the_text_do_not_cut_it_off_from_the_image():
    # image, image, pad, pad, bos, newline, yes; pads carry mask_ar = 1.
    mask = masks.make_attn_mask(row("0011001"), row("1100111"))
    np.testing.assert_array_equal(mask[0, 0], row("1100110")[0])
    np.testing.assert_array_equal(mask[0, 4], row("1100110")[0])
    np.testing.assert_array_equal(mask[0, 6], row("1100111")[0])


def test_causal_block_of_two_steps():
    # mask_ar = 0 behind a 1 belongs to the same step: both see each other.
    mask = masks.make_attn_mask(row("0101"), row("1111"))
    np.testing.assert_array_equal(mask[0], rows("1000", "1110", "1110", "1111"))


def test_sliding_window_limits_suffix_rows_only():
    positions = np.arange(5)[None]
    prefix = row("11100")
    mask = masks.sliding_window_mask(positions, positions, prefix, prefix, 2)
    np.testing.assert_array_equal(mask[0], rows("11111", "11111", "11111", "00111", "00011"))


def test_sliding_window_counts_positions_not_pads():
    # Indices 0 and 3 are three apart, but only pads lie between: positions 0 and 1.
    mask_input = row("1001")
    positions = masks.token_positions(mask_input)
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1]])
    nobody = np.zeros((1, 4), bool)
    mask = masks.sliding_window_mask(positions, positions, nobody, nobody, 2)
    assert mask[0, 3, 0]


@pytest.mark.parametrize(
    ("mask_ar", "mask_input", "last"),
    [
        ("00011", "11110", 2),  # pads behind
        ("10001", "01111", 3),  # pads in front
        ("00111", "11000", 1),  # a prompt alone
        ("00000", "11111", 4),  # everything is prefix
        ("11111", "11111", 0),  # no prefix at all
    ],
)
def test_last_prefix_position(mask_ar, mask_input, last):
    assert masks.last_prefix_position(row(mask_ar), row(mask_input)).tolist() == [last]


def test_positions_skip_pads():
    np.testing.assert_array_equal(
        masks.token_positions(rows("110011", "001111")), [[0, 1, 1, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    )
