"""Shots of a video: KTS on cheap descriptors, borders moved to the exact native frame of the cut.

The descriptors and the snapping are our own design; no paper prescribes them. The published TVSum
and SumMe evaluations bring their own shots, so the numbers there do not depend on this module.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.summary import kts

# Descriptor: pixels looked at per side, cells of the layout per side, colour bins per channel.
_PIXELS, _CELLS, _BINS = 64, 4, 6

# KTS on the descriptors: chosen by eye on films with many cuts and on hand-held single takes. The
# frame rate that weakens the penalty is that of film, not of the file, so that a video has the same
# shots at 3 and at 60 frames per second.
_PENALTY, _NOMINAL_FPS = 1.5, 24.0
# At most one change a second: shots shorter than that are not worth cutting a summary from.
_CHANGES_PER_S = 1.0
# KTS is cubic where pictures repeat exactly (a strobe light), so long videos are segmented in
# windows of about this many samples: ten minutes at two per second.
_WINDOW = 1200

# A cut is clear when `change` is this many times the median of its surroundings (within the given
# seconds) and above what noise gives (`change` is 1 from black to white).
_CLEAR_RATIO, _CLEAR_CONTEXT_S, _CLEAR_FLOOR = 2.0, 2.0, 0.02

_LARGE_BUDGET = 1 / 3  # above it few shots of the greatest length fit, and much of it stays empty
_USUAL_SHOT_S = 5.0  # the mean length of the published KTS shots of TVSum


@dataclasses.dataclass(frozen=True)
class Shot:
    """A run of native frames; half-open: `end_frame` and `end_s` belong to the next shot."""

    start_s: float
    end_s: float
    start_frame: int
    end_frame: int


def frame_descriptors(frames: Sequence[np.ndarray]) -> np.ndarray:
    """What a frame looks like, in few numbers: half colour, half layout.

    Colour is the square root of a joint RGB histogram (so that the inner product of two is their
    Bhattacharyya coefficient), layout is the mean colour of a 4 x 4 grid around mid-grey. Each half
    has norm sqrt(1/2), so the inner product of two descriptors is at most 1.

    Args:
      frames: N pictures of uint8[H, W, 3], RGB, in an array or not; one is asked for at a time.

    Returns:
      float32[N, 264], L2-normalised rows.
    """
    cell = _PIXELS // _CELLS
    found = np.empty((len(frames), _BINS**3 + 3 * _CELLS**2), np.float32)
    for out, frame in zip(found, frames, strict=True):
        if np.ndim(frame) != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            got = f"{np.asarray(frame).dtype}{[len(frames), *np.shape(frame)]}"
            raise UserError(f"frames must be uint8[N, H, W, 3], got {got}")
        rows = (np.arange(_PIXELS) * frame.shape[0]) // _PIXELS
        columns = (np.arange(_PIXELS) * frame.shape[1]) // _PIXELS
        small = frame[rows[:, None], columns[None]].astype(np.int64)
        bins = small * _BINS // 256
        index = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
        colour = np.sqrt(np.bincount(index.ravel(), minlength=_BINS**3) / index.size)
        layout = small.reshape(_CELLS, cell, _CELLS, cell, 3).mean((1, 3)).ravel() / 255 - 0.5
        norm = np.linalg.norm(layout)
        # An all mid-grey layout has no direction; any fixed one will do.
        layout = layout / norm if norm > 1e-6 else np.full(layout.size, layout.size**-0.5)
        out[: colour.size] = colour * 0.5**0.5
        out[colour.size :] = layout * 0.5**0.5
    return found


def shot_limit_s(duration_s: float, budget: float = 0.15) -> float:
    """A `max_shot_s` with which the budget can always be used: no shot is longer than it.

    With every shot within the budget at least one fits; beyond that shots are kept to 5 s, the mean
    of the published shots of TVSum, so that a summary of a longer video has several. A large budget
    asks for small parts: of two shots of 3 s, 5 s can only hold one.
    """
    limit_s = min(_USUAL_SHOT_S, budget * duration_s)
    return limit_s if budget <= _LARGE_BUDGET else min(limit_s, max(1.0, duration_s / 10))


def detect_shots(
    frames: Sequence[np.ndarray],
    frame_times: np.ndarray,
    *,
    native_times: np.ndarray,
    change: np.ndarray,
    max_shot_s: float | None,
    duration_s: float | None = None,
) -> list[Shot]:
    """The shots of a video whose sampled frames are at hand; see `shots_of`.

    Args:
      frames: N sampled frames of uint8[H, W, 3], as `frame_descriptors` takes them.
      frame_times: float[N], seconds, ascending.
      native_times: float[n_frames], start of every native frame, seconds, ascending from 0.
      change: float[n_frames], how much native frame i differs from frame i - 1, in [0, 1].
      max_shot_s: longest shot in seconds, or None.
      duration_s: end of the last native frame, or None.
    """
    return shots_of(
        frame_descriptors(frames),
        frame_times,
        native_times=native_times,
        change=change,
        max_shot_s=max_shot_s,
        duration_s=duration_s,
    )


def shots_of(
    descriptors: np.ndarray,
    frame_times: np.ndarray,
    *,
    native_times: np.ndarray,
    change: np.ndarray,
    max_shot_s: float | None,
    duration_s: float | None = None,
) -> list[Shot]:
    """The shots of a video, in order, without gaps, covering all native frames.

    KTS finds borders between sampled frames. Each border then moves to the native frame with the
    greatest `change` within one sampling step of it, if that is a clear peak (a cut); else it stays
    on the sampled frame (a dissolve, a pan). No shot so found is shorter than a sampling step.
    Shots longer than `max_shot_s` are split into the fewest parts that are not, about equal ones,
    because a shot longer than the budget could never be selected.

    Args:
      descriptors: float[N, D], `frame_descriptors` of sampled frames.
      frame_times: float[N], seconds, ascending.
      native_times: float[n_frames], start of every native frame, seconds, ascending from 0.
      change: float[n_frames], how much native frame i differs from frame i - 1, in [0, 1].
      max_shot_s: longest shot in seconds (a native frame is never split), `shot_limit_s` gives one
        that fits a budget; None = no splitting.
      duration_s: end of the last native frame; None = one median frame after its start.

    Raises:
      UserError: the arrays do not fit each other, are empty, or `max_shot_s` is not positive.
    """
    frame_times = np.asarray(frame_times, np.float64)
    native_times = np.asarray(native_times, np.float64)
    change = np.asarray(change, np.float64)
    descriptors = np.asarray(descriptors)
    if len(descriptors) != len(frame_times) or not len(descriptors):
        raise UserError(
            f"got {len(descriptors)} frames and {len(frame_times)} frame times, want >= 1"
        )
    if change.shape != native_times.shape or not len(native_times):
        raise UserError(
            f"`change` needs one value per native frame, got {change.shape} and "
            f"{native_times.shape}"
        )
    if max_shot_s is not None and not max_shot_s > 0:
        raise UserError(f"max_shot_s must be greater than 0 seconds or None, got {max_shot_s}")
    n_frames = len(native_times)
    period_s = float(np.median(np.diff(native_times))) if n_frames > 1 else 1.0 / 25
    if duration_s is None:
        duration_s = float(native_times[-1]) + period_s
    edges = np.append(native_times, duration_s)  # edges[i]: when native frame i begins

    step_s = float(np.median(np.diff(frame_times))) if len(frame_times) > 1 else period_s
    borders: list[int] = []
    for sample in _borders(descriptors, step_s):
        border = _snap(frame_times[sample], step_s, native_times, change)
        # No shot is shorter than a sampling step: scraps at either end are nobody's highlight, and
        # where snapping brings two borders together (a flash) the stronger one is the cut.
        if min(edges[border], duration_s - edges[border]) < step_s - 1e-3:
            continue
        if not borders or edges[border] - edges[borders[-1]] >= step_s - 1e-3:
            borders.append(border)
        elif change[border] > change[borders[-1]]:
            borders[-1] = border

    shots = []
    for start, end in zip([0, *borders], [*borders, n_frames], strict=True):
        for first, last in _split(start, end, edges, max_shot_s):
            shots.append(Shot(float(edges[first]), float(edges[last]), first, last))
    return shots


def _borders(descriptors: np.ndarray, step_s: float) -> np.ndarray:
    """int[m]: samples that begin a new shot, found window by window."""
    N = len(descriptors)
    moved = np.zeros(N)
    for first in range(1, N, _WINDOW):  # in parts: in float64 all of them would be large
        part = descriptors[first - 1 : first + _WINDOW].astype(np.float64)
        moved[first : first + _WINDOW] = (np.diff(part, axis=0) ** 2).sum(1)
    starts = [0]
    while N - starts[-1] > 1.5 * _WINDOW:
        # Windows meet where the picture changes most, so that no shot is cut by a window's end.
        near = starts[-1] + np.arange(_WINDOW // 2, _WINDOW + 1)
        starts.append(int(near[np.argmax(moved[near])]))
    found = []
    for start, end in zip(starts, [*starts[1:], N], strict=True):
        inside = kts.change_points(
            descriptors[start:end].astype(np.float64),
            max_change_points=max(1, math.floor((end - start) * step_s * _CHANGES_PER_S)),
            penalty=_PENALTY,
            descriptor_rate=max(1.0, step_s * _NOMINAL_FPS),
        )
        found.extend([start, *(start + inside)] if start else inside)
    return np.asarray(found, np.int64)


def _snap(border_s: float, step_s: float, native_times: np.ndarray, change: np.ndarray) -> int:
    """The native frame at which a shot that KTS begins at `border_s` really begins."""
    # The picture on screen at border_s; timestamps rounded to a container's tick may fall after it.
    nominal = max(0, int(np.searchsorted(native_times, border_s + 1e-3, side="right")) - 1)
    first, last = np.searchsorted(native_times, [border_s - step_s, border_s + step_s])
    first = max(1, int(first))
    if first >= last:
        return nominal
    peak = first + int(np.argmax(change[first:last]))
    lo, hi = np.searchsorted(
        native_times, native_times[peak] + np.array([-_CLEAR_CONTEXT_S, _CLEAR_CONTEXT_S])
    )
    around = np.delete(change[max(1, lo) : hi], peak - max(1, lo))
    usual = float(np.median(around)) if around.size else 0.0
    clear = change[peak] >= max(_CLEAR_FLOOR, _CLEAR_RATIO * usual)
    return peak if clear else nominal


def _split(
    start: int, end: int, edges: np.ndarray, max_shot_s: float | None
) -> list[tuple[int, int]]:
    """The fewest parts of a shot of native frames that are not above `max_shot_s`.

    They are about equal in time. A frame that lasts longer is a part by itself.
    """
    times, count = edges[start : end + 1], end - start
    if max_shot_s is None or times[-1] - times[0] <= max_shot_s:
        return [(start, end)]
    # Where a part that begins with each frame ends at the latest.
    latest = np.searchsorted(times, times[:-1] + max_shot_s + 1e-9, "right") - 1
    latest = np.maximum(latest, np.arange(1, count + 1)).tolist()
    needed = [0] * (count + 1)  # parts of what is left from each frame on
    for i in reversed(range(count)):
        needed[i] = 1 + needed[latest[i]]
    falling = -np.array(needed)
    cuts = [0]
    for part in range(1, needed[0]):
        even = np.searchsorted(times, times[0] + (times[-1] - times[0]) * part / needed[0])
        left = needed[0] - part
        enough = np.searchsorted(falling, -left)  # from here on the parts that are left will do
        cut = max(even, enough, cuts[-1] + 1)
        cuts.append(int(min(cut, latest[cuts[-1]], count - left)))
    return [(start + a, start + b) for a, b in itertools.pairwise([*cuts, count])]
