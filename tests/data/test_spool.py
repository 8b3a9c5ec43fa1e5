"""Pictures and sound in temporary files: the same comes back, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest

from deevisum_jax.data.spool import PictureSpool, SoundSpool
from deevisum_jax.data.video import View, decode_video
from deevisum_jax.errors import UserError
from tests.media import solid_frames, write_video


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), np.uint8)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_pictures_come_back_in_any_order():
    given = pictures(5)
    stored = PictureSpool()
    for picture in given:
        stored.append(picture)
    assert len(stored) == 5
    for index in (3, 0, np.int64(4), -1):
        np.testing.assert_array_equal(stored[index], given[index])
    np.testing.assert_array_equal(np.asarray(stored), given)
    with pytest.raises(IndexError):
        stored[5]


def test_a_turned_picture_comes_back_turned():
    [given] = pictures(1)
    stored = PictureSpool()
    stored.append(np.rot90(given[:, ::-1]))
    np.testing.assert_array_equal(stored[0], np.rot90(given[:, ::-1]))


def test_a_picture_that_stays_on_screen_is_stored_once():
    first, second = pictures(2)
    stored = PictureSpool()
    for picture in (first, first, second, second, second, first):
        stored.append(picture)
    np.testing.assert_array_equal(np.asarray(stored), [first, first, second, second, second, first])
    assert stored.nbytes == 3 * first.nbytes


def test_sound_comes_back_as_float_with_silence_in_the_gaps():
    stored = SoundSpool()
    assert stored.is_silent
    stored.write(2, np.array([16_384, -32_768], np.int16))
    stored.write(6, np.array([8_192, 1], np.int16))
    stored.write(7, np.array([0, -8_192], np.int16))  # over the last one
    wanted = np.array([0, 0, 0.5, -1, 0, 0, 0.25, 0, -0.25], np.float32)
    assert (len(stored), stored.nbytes, stored.is_silent) == (9, 18, False)
    np.testing.assert_array_equal(stored[:], wanted)
    np.testing.assert_array_equal(stored[3:7], wanted[3:7])
    np.testing.assert_array_equal(stored[6:99], wanted[6:])
    assert stored[20:30].shape == (0,)
    assert stored[:].dtype == np.float32


def test_the_file_has_no_name_and_goes_with_its_last_reference(folder):
    before = open_files()
    stored, sound = PictureSpool(), SoundSpool()
    stored.append(pictures(1)[0])
    sound.write(0, np.ones(9, np.int16))
    assert list(folder.iterdir()) == []
    assert open_files() == before + 2
    del stored
    del sound
    assert open_files() == before


def test_a_write_that_takes_only_a_part_goes_on(monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:50], offset))
    stored = PictureSpool()
    for picture in pictures(2):
        stored.append(picture)
    np.testing.assert_array_equal(np.asarray(stored), pictures(2))


def test_a_full_disk_is_said_so(monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    for write in (
        lambda: PictureSpool().append(pictures(1)[0]),
        lambda: SoundSpool().write(0, np.ones(2, np.int16)),
    ):
        with pytest.raises(
            UserError, match=r"cannot be written \(No space left on device\).*TMPDIR"
        ):
            write()


def test_the_folder_that_is_full_is_named(folder, monkeypatch):
    stored = PictureSpool()

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    monkeypatch.delenv("TMPDIR", raising=False)  # TEMP, TMP or a default may be in use as well
    with pytest.raises(UserError, match=f"make room in {folder}, or set TMPDIR"):
        stored.append(pictures(1)[0])


def test_no_folder_for_temporary_files_is_said_so(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(UserError, match="set TMPDIR to a folder on another disk"):
        PictureSpool()


def test_decoding_leaves_no_file_when_it_fails(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", solid_frames([0, 99, 200]), fps=2)
    before = open_files()

    def fails(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode_video(path, others=[View(see=fails)])
    assert open_files() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_memory_does_not_hold_what_was_read():
    """Pages of a mapped file would count; 60 pictures of 3 MB would be 180."""

    def resident_mb() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    stored = PictureSpool()
    for k in range(60):
        stored.append(np.full((1000, 1000, 3), k, np.uint8))
    before = resident_mb()
    assert [int(picture[7, 7, 0]) for picture in stored] == list(range(60))
    assert resident_mb() - before < 60
    assert stored.nbytes == 180e6
