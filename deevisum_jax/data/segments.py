"""A video as the model meets it: two-second segments of frames, words and sound.

The same path serves a record of a data set and a file off the disk: both become a `Video`, and
`SegmentEncoder` turns any segment of it into the fields of a `Batch`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image

from deevisum_jax.data import audio, augment, subtitles
from deevisum_jax.data.prompts import PromptEncoder
from deevisum_jax.data.spool import SoundSpool
from deevisum_jax.errors import UserError
from deevisum_jax.typing import INPUTS, RESIZES

# Stands for a picture that is left out; close to 0 after the model's scaling to [-1, 1].
_GRAY = 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """One video, decoded or as stored. Times are seconds from the first frame."""

    title: str
    duration_s: float
    frames: Sequence[np.ndarray | bytes]  # uint8[H, W, 3] or encoded JPEG; in memory or not
    frame_times: np.ndarray  # float[N], ascending
    cues: Sequence[subtitles.Cue]
    waveform: np.ndarray | SoundSpool | None  # float32[n], 16 kHz mono; slices of it are read
    captions: Sequence[subtitles.Cue] = ()  # what is seen and heard, told by people; for training


def segment_bounds(duration_s: float, segment_s: float) -> np.ndarray:
    """`float64[M, 2]` start and end of the segments that tile a video.

    Every segment but the last is `segment_s` long; a last one under half of that joins its
    neighbour: `segment_bounds(4.5, 2.0)` is `[[0, 2], [2, 4.5]]`.
    """
    count = max(1, int(np.floor(duration_s / segment_s + 0.5)))
    edges = np.append(np.arange(count) * segment_s, duration_s)
    return np.stack([edges[:-1], edges[1:]], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentEncoder:
    """Encodes segments: `num_frames` evenly spaced pictures, the prompt, the masks."""

    prompts: PromptEncoder
    num_frames: int  # I, pictures per segment
    image_size: int  # H = W, pixels
    resize: str = "bilinear"  # of `RESIZES`
    context_s: float = 0.0  # seconds before and after a segment whose transcript is told, too
    left_out: tuple[str, ...] = ()  # inputs withheld, of `INPUTS`: for ablations

    def __post_init__(self) -> None:
        assert set(self.left_out) <= set(INPUTS), self.left_out
        assert self.resize in RESIZES, self.resize

    def frames(
        self,
        video: Video,
        start_s: float,
        end_s: float,
        change: augment.Augmentation | None = None,
    ) -> np.ndarray:
        """`uint8[I, H, W, 3]`: the stored frames nearest to I evenly spaced instants.

        Args:
          video: theirs.
          start_s: where the segment starts, in seconds.
          end_s: where it ends.
          change: made to all of them alike; None = none.

        Raises:
          UserError: the video is stored without pictures.
        """
        size = self.image_size
        if "picture" in self.left_out:
            return np.full((self.num_frames, size, size, 3), _GRAY, np.uint8)
        if not len(video.frames):
            raise UserError(
                f"the video {video.title!r} is stored without pictures, as those of a data set of "
                "features are; choose a data set with them (data.dataset), or leave pictures out "
                "(data.left_out)"
            )
        instants = (
            start_s + (np.arange(self.num_frames) + 0.5) * (end_s - start_s) / self.num_frames
        )
        chosen = _nearest(video.frame_times, instants)
        return np.stack([_picture(video.frames[i], size, self.resize, change) for i in chosen])

    def sound(self, video: Video, start_s: float, end_s: float) -> str:
        """What a segment sounds like, in words; costs some milliseconds, so keep it."""
        if "sound" in self.left_out:
            return ""
        if video.waveform is None:
            return audio.describe(None)
        first, last = round(start_s * audio.SAMPLE_RATE), round(end_s * audio.SAMPLE_RATE)
        return audio.describe(video.waveform[first:last])

    def text(
        self, video: Video, start_s: float, end_s: float, *, sound: str, label: int
    ) -> dict[str, np.ndarray]:
        """Tokens and masks of a segment that sounds like `sound`; see `PromptEncoder.encode`.

        The caption is the one at the middle of the segment, if the video has captions.
        """
        centre = (start_s + end_s) / 2
        has_text = "text" not in self.left_out
        cues = video.cues if has_text else ()
        before, after = (
            subtitles.lines_around(cues, start_s, end_s, self.context_s)
            if self.context_s
            else ((), ())
        )
        return self.prompts.encode(
            title=video.title if has_text else "",
            transcript=subtitles.text_between(cues, start_s, end_s),
            sound=sound,
            label=label,
            before=before,
            after=after,
            caption=subtitles.text_between(video.captions, centre, centre),
        )


def _nearest(times: np.ndarray, instants: np.ndarray) -> np.ndarray:
    """int[I]: which of the times float[N], ascending, is nearest to each of float[I].

    Of two that are as near it is the earlier. Not all times are looked at, since every segment of a
    video asks.
    """
    after = np.searchsorted(times, instants)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(times) - 1)
    return np.where(instants - times[before] <= times[after] - instants, before, after)


def _picture(
    frame: np.ndarray | bytes, size: int, resize: str, change: augment.Augmentation | None
) -> np.ndarray:
    image = (
        PIL.Image.open(io.BytesIO(frame))
        if isinstance(frame, bytes)
        else PIL.Image.fromarray(frame)
    )
    resample = PIL.Image.Resampling[resize.upper()]
    if change is not None:
        return change.apply(image, size, resample)
    if image.size != (size, size):
        # The aspect is not kept, as in big_vision and in Hugging Face.
        image = image.resize((size, size), resample)
    return np.asarray(image.convert("RGB"))
