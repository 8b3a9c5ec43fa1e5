"""What any decoder finds in a video file, as the fields of a record.

    media = read_media("talk.mp4", frame_rate=2.0)
    record = {"video_id": "talk", ..., **media.fields()}

All builders read files here, so that a picture, a sound and a line of text mean the same in every
data set. Pictures are compressed as they pass by: a video of hours needs no more memory than its
record.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from deevisum_jax.data import audio, subtitles, video
from deevisum_jax.summary import shots
from tfds_builders import downloads, workers

FRAME_SIZE = 256  # height and width of stored pictures: room to crop 224 out of it
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """A video file that was read, on its own timeline."""

    info: video.VideoInfo
    frames: list[bytes]  # N pictures, JPEG
    frame_times: np.ndarray  # float64[N], seconds
    waveform: np.ndarray  # int16[n], 16 kHz mono; empty without sound
    cues: list[subtitles.Cue]
    shots: list[shots.Shot]  # by our KTS, in the file's native frames

    def fields(self) -> dict[str, Any]:
        """The fields of a record (`records.py`) that the file alone decides."""
        return {
            "transcript": [
                {"start": cue.start_s, "end": cue.end_s, "text": cue.text} for cue in self.cues
            ],
            "audio": self.waveform,
            "frames": self.frames,
            "frame_times": self.frame_times.astype(np.float32),
        }


def read_media(
    path: str | os.PathLike,
    *,
    frame_rate: float,
    frame_size: int = FRAME_SIZE,
    sound: bool = True,
    subtitles_path: str | os.PathLike | None = None,
) -> Media:
    """Reads pictures, sound, subtitles and shots of a video file.

    Args:
      path: the file.
      frame_rate: pictures per second to keep.
      frame_size: their height and width in pixels; the aspect is not kept.
      sound: whether to read the sound, too.
      subtitles_path: None takes what lies beside or in the file (`subtitles.load_subtitles`).

    Raises:
      UserError: the file cannot be opened, or nothing of it decodes; its subtitles cannot be read.
    """
    taken = _Pictures()
    shown = video.show_video(
        path,
        taken.take,
        frame_rate=frame_rate,
        size=(frame_size, frame_size),
        one_thread=True,  # builders read as many files at a time as there are cores
    )
    waveform = audio.decode_audio(path) if sound and shown.info.has_audio else None
    found = shots.shots_of(
        np.stack(taken.descriptors),
        shown.frame_times,
        native_times=shown.native_times,
        change=shown.change,
        max_shot_s=shots.shot_limit_s(shown.info.duration_s),
        duration_s=shown.info.duration_s,
    )
    return Media(
        info=shown.info,
        frames=taken.frames,
        frame_times=shown.frame_times,
        waveform=np.zeros(0, np.int16) if waveform is None else _int16(waveform),
        cues=subtitles.load_subtitles(path, subtitles_path),
        shots=found,
    )


class _Pictures:
    """Compresses pictures and describes them; one that stays on screen is worked on once."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.descriptors: list[np.ndarray] = []
        self._latest: np.ndarray | None = None

    def take(self, picture: np.ndarray) -> None:
        if picture is not self._latest:
            jpeg, descriptor = _jpeg(picture), shots.frame_descriptors(picture[None])[0]
        else:
            jpeg, descriptor = self.frames[-1], self.descriptors[-1]
        self._latest = picture
        self.frames.append(jpeg)
        self.descriptors.append(descriptor)


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _int16(waveform: np.ndarray) -> np.ndarray:
    """The decoder divides 16-bit samples by 32768: these are those very samples."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)


def read_many(
    paths: Sequence[pathlib.Path], *, frame_rate: float, sound: bool
) -> Iterator[dict[str, Any]]:
    """Reads many files, one process per CPU core, and yields what they hold in order.

    Each is `Media.fields()` and, beside: `shot_times` float64[S, 2] in seconds, `duration_s`,
    `notes` (what is unusual about the file) and `source`, its `downloads.fingerprint`.

    Raises:
      UserError: as `read_media`; or a process died.
    """
    job = {"paths": [os.fspath(path) for path in paths], "frame_rate": frame_rate, "sound": sound}
    yield from workers.records(
        __name__, job, len(paths), lambda index: f"a record of {paths[index]}"
    )


def _serve(job: dict[str, Any], index: int) -> dict[str, Any]:
    path = pathlib.Path(job["paths"][index])
    media = read_media(path, frame_rate=job["frame_rate"], sound=job["sound"])
    return media.fields() | {
        "shot_times": np.array([(shot.start_s, shot.end_s) for shot in media.shots]),
        "duration_s": media.info.duration_s,
        "notes": list(media.info.notes),
        "source": downloads.fingerprint(path),
    }


if __name__ == "__main__":
    workers.serve(sys.argv[1], _serve)
