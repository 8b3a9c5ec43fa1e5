"""Sound: decoding to 16 kHz mono on the video's clock, log-mel features, and measures in words.

The measures are our own design: cheap, deterministic signal statistics that put what is heard into
a prompt. None of them is a trained classifier, and their thresholds are round numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable

import av
import numpy as np

from deevisum_jax.media import audio_stream, open_media, presentation_start_s, read_sound

SAMPLE_RATE = 16_000

# A frame of sound that lies this far from where the one before ended starts a new run at its own
# timestamp; anything nearer is container rounding.
_MAX_DRIFT_S = 0.05

LOG_FLOOR = 1e-10  # power; log-mel values and loudness bottom out here (-100 dB)

# The whole vocabulary of `describe`, so that a tokenizer can cover it.
NO_SOUND = "no sound"
LOUDNESS_WORDS = ("silent", "quiet", "moderate", "loud")
LOUDNESS_EDGES_DB = (-55.0, -32.0, -20.0)  # dBFS, between one word and the next
SPEECH_WORD, MUSIC_WORD = "speech", "music"
ONSET_WORDS = ("no onsets", "few onsets", "many onsets")
ONSET_EDGES_PER_S = (0.5, 4.0)
DESCRIPTION_WORDS = (NO_SOUND, *LOUDNESS_WORDS, SPEECH_WORD, MUSIC_WORD, *ONSET_WORDS)
LIKENESS_THRESHOLD = 0.5  # from here on a window is called speech, or music

SILENCE_DB = -50.0  # a 25 ms frame below this is silent, dBFS
MIN_LIKENESS_S = 0.5  # shorter windows hold too little rhythm to tell speech or music


def decode_audio(path: str | os.PathLike) -> np.ndarray | None:
    """Decodes the default sound stream to 16 kHz mono, aligned to the first video frame.

    Returns:
      float32[n] in [-1, 1], sample 0 at the video's time 0 (it may end before or after the
      pictures do); None when there is no sound stream.

    How it is aligned and what it raises are those of `hear_audio`.
    """
    pieces: list[tuple[int, np.ndarray]] = []
    if not hear_audio(path, lambda start, samples: pieces.append((start, samples))):
        return None
    out = np.zeros(max((start + len(piece) for start, piece in pieces), default=0), np.float32)
    for start, piece in pieces:
        out[start : start + len(piece)] = piece.astype(np.float32) / 32768
    return out


def hear_audio(path: str | os.PathLike, hear: Callable[[int, np.ndarray], object]) -> bool:
    """Decodes the default sound stream to 16 kHz mono and hands it over piece by piece.

    Sound before the first frame is cut; a late start, gaps and skipped damaged packets are places
    that nothing is handed over for. Channels are mixed down by FFmpeg's normalised matrix, so the
    result cannot clip. In a file without pictures time 0 is the first sound. Nothing is kept, so
    hours of sound stream through.

    Args:
      path: the file.
      hear: is given the place of each piece's first sample, counted from the video's time 0, and
        the samples, int16[n]. Pieces of a stream whose clock jumps back may overlap; the later one
        counts.

    Returns:
      Whether there is a sound stream.

    Raises:
      UserError: the file cannot be opened (see `media.open_media`).
    """
    with open_media(path) as container:
        stream = audio_stream(container)
        if stream is None:
            return False
        zero_s = presentation_start_s(path)
        run: _Run | None = None
        for frame, time_s in read_sound(container, stream):
            if run is None or not run.continues(frame, time_s):
                if run is not None:
                    run.close()
                if time_s is None:
                    time_s = run.end_s if run is not None else zero_s or 0.0
                if zero_s is None:
                    zero_s = time_s
                run = _Run(frame, time_s, round((time_s - zero_s) * SAMPLE_RATE), hear)
            run.add(frame)
        if run is not None:
            run.close()
    return True


class _Run:
    """Frames of sound that follow one another without a gap, resampled as one piece."""

    def __init__(
        self,
        first: av.AudioFrame,
        start_s: float,
        at: int,
        hear: Callable[[int, np.ndarray], object],
    ):
        self._kind = _sound_kind(first)
        self._rate = first.sample_rate
        self._start_s, self._n = start_s, 0
        # 16-bit output makes swresample normalise its mixing matrix; float output would not.
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        self._at, self._hear = at, hear  # place of the next sample

    @property
    def end_s(self) -> float:
        return self._start_s + self._n / self._rate

    def continues(self, frame: av.AudioFrame, time_s: float | None) -> bool:
        if _sound_kind(frame) != self._kind:
            return False
        return time_s is None or abs(time_s - self.end_s) <= _MAX_DRIFT_S

    def add(self, frame: av.AudioFrame) -> None:
        self._n += frame.samples
        frame.pts = None  # placed by `at`; the resampler must not fill or drop on its own
        self._take(self._resampler.resample(frame))

    def close(self) -> None:
        self._take(self._resampler.resample(None))

    def _take(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            samples = frame.to_ndarray()[0]
            start, self._at = self._at, self._at + len(samples)
            samples = samples[max(-start, 0) :]
            if len(samples):
                self._hear(max(start, 0), samples)


def _sound_kind(frame: av.AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.format.name, frame.layout.name


def log_mel(
    waveform: np.ndarray, *, num_mels: int = 64, window_s: float = 0.025, hop_s: float = 0.010
) -> np.ndarray:
    """Natural log of a mel power spectrogram, as librosa computes it.

    Equal to `log(max(librosa.feature.melspectrogram(y, sr=16000, n_fft=window, hop_length=hop,
    n_mels=num_mels), 1e-10))`: Hann window, frames centred on multiples of the hop with zeros
    beyond both ends, power 2, Slaney's mel scale with area-normalised triangles up to 8 kHz.

    Args:
      waveform: float[n] at 16 kHz.
      num_mels: number of mel bands.
      window_s: window length in seconds.
      hop_s: hop length in seconds.

    Returns:
      float32[M, num_mels] with M = 1 + n // hop.
    """
    window, hop = round(window_s * SAMPLE_RATE), round(hop_s * SAMPLE_RATE)
    padded = np.pad(np.asarray(waveform, np.float32), window // 2)
    if len(padded) < window:  # an empty waveform and an odd window
        padded = np.pad(padded, (0, window - len(padded)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    frames = frames[: 1 + len(waveform) // hop]
    filters = mel_filters(num_mels, window).T  # [bins, num_mels]
    hann = _hann(window)
    out = np.empty((len(frames), num_mels), np.float32)
    for at in range(0, len(frames), 4096):  # bounded memory on an hour of sound
        power = np.abs(np.fft.rfft(frames[at : at + 4096] * hann)) ** 2
        out[at : at + 4096] = np.log(np.maximum(power @ filters, LOG_FLOOR))
    return out


@functools.cache
def mel_filters(num_mels: int, n_fft: int) -> np.ndarray:
    """Slaney's mel filterbank, float64[num_mels, n_fft // 2 + 1], from 0 Hz to 8 kHz.

    Linear below 1 kHz (3 mel per 200 Hz) and logarithmic above (27 mel per factor 6.4); each
    triangle has area 1 over frequency (Slaney, Auditory Toolbox, 1998).
    """
    linear_hz, knee_hz, log_step = 200.0 / 3, 1000.0, np.log(6.4) / 27
    knee_mel = knee_hz / linear_hz
    top_mel = knee_mel + np.log(SAMPLE_RATE / 2 / knee_hz) / log_step
    mels = np.linspace(0.0, top_mel, num_mels + 2)
    edges_hz = np.where(
        mels < knee_mel, mels * linear_hz, knee_hz * np.exp(log_step * (mels - knee_mel))
    )
    bins_hz = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rise, fall = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    return np.maximum(0.0, np.minimum(rise, fall)) * 2 / (high - low)


@functools.cache
def _hann(n: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)  # periodic


@dataclasses.dataclass(frozen=True)
class AudioMeasures:
    """What a window of sound is like, from signal statistics alone.

    Attributes:
      loudness_db: root mean square over the window in dB of full scale; a full-scale sine is
        -3.0, a full-scale square 0.0, zeros -100.0.
      silence_fraction: share of 25 ms frames whose own loudness is under -50 dBFS, in [0, 1].
      speech_likeness: in [0, 1]; the product of three soft steps and of (1 - music_likeness).
        The envelope of 300-3400 Hz must vary at 2-8 Hz, the rate of syllables (its share of the
        0.5-20 Hz modulation power), must vary deeply (standard deviation over mean), and enough
        sounding frames must be voiced (autocorrelation peak at 70-400 Hz). 0 under 0.5 s.
      music_likeness: in [0, 1]; a soft step (0 at 5 %, 1 at 40 %) of the share of the energy of
        60 Hz to 5 kHz that lies in spectral peaks which hold their frequency for 0.25 s, as notes
        do and gliding speech, noise and clicks do not. 0 under 0.5 s.
      onsets_per_s: peaks of the spectral flux (rises of log band energies) per second.
    """

    loudness_db: float
    silence_fraction: float
    speech_likeness: float
    music_likeness: float
    onsets_per_s: float


def measure(waveform: np.ndarray) -> AudioMeasures:
    """Measures a window of sound, float[n] at 16 kHz; made for about 2 s, any n works."""
    waveform = np.asarray(waveform, np.float32)
    duration_s = len(waveform) / SAMPLE_RATE
    if not len(waveform):
        return AudioMeasures(-100.0, 1.0, 0.0, 0.0, 0.0)
    frames = _frames(waveform, 400, 160)
    silent = _db(np.mean(np.square(frames), axis=1)) < SILENCE_DB
    music = speech = 0.0
    if duration_s >= MIN_LIKENESS_S and not silent.all():
        music = _music_likeness(waveform)
        speech = _speech_likeness(waveform, ~silent) * (1 - music)
    return AudioMeasures(
        loudness_db=float(_db(np.mean(np.square(waveform, dtype=np.float64)))),
        silence_fraction=float(silent.mean()),
        speech_likeness=speech,
        music_likeness=music,
        onsets_per_s=_count_onsets(frames) / duration_s,
    )


def describe(waveform: np.ndarray | None) -> str:
    """Puts a window of sound into words of `DESCRIPTION_WORDS`, comma-separated.

    For example `"loud, speech, few onsets"`; `"silent"` alone under -55 dBFS (an empty window
    too), and `"no sound"` for None, the sign of a video without a sound stream.
    """
    if waveform is None:
        return NO_SOUND
    measures = measure(waveform)
    words = [LOUDNESS_WORDS[np.searchsorted(LOUDNESS_EDGES_DB, measures.loudness_db, "right")]]
    if words == [LOUDNESS_WORDS[0]]:
        return words[0]
    if measures.speech_likeness >= LIKENESS_THRESHOLD:
        words.append(SPEECH_WORD)
    if measures.music_likeness >= LIKENESS_THRESHOLD:
        words.append(MUSIC_WORD)
    words.append(ONSET_WORDS[np.searchsorted(ONSET_EDGES_PER_S, measures.onsets_per_s, "right")])
    return ", ".join(words)


def _frames(waveform: np.ndarray, window: int, hop: int) -> np.ndarray:
    """float32[n, window]: whole windows; a shorter waveform is one frame, filled with zeros."""
    if len(waveform) < window:
        waveform = np.pad(waveform, (0, window - len(waveform)))
    return np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]


def _db(power: np.ndarray | float) -> np.ndarray | float:
    return 10 * np.log10(np.maximum(power, LOG_FLOOR))


def _soft_step(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high`, straight in between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def _music_likeness(waveform: np.ndarray) -> float:
    window, hop, hold = 2048, 512, 8  # 128 ms: 7.8 Hz bins; 8 hops of 32 ms hold for 0.25 s
    magnitude = np.abs(np.fft.rfft(_frames(waveform, window, hop) * _hann(window)))
    magnitude = magnitude[:, 8:640]  # 62 Hz to 5 kHz: below is rumble, above no note's fundamental
    # A note stands 12 dB above the geometric mean of the 250 Hz around it; noise seldom does.
    log_magnitude = np.log(np.maximum(magnitude, LOG_FLOOR))
    total = np.cumsum(np.pad(log_magnitude, ((0, 0), (17, 16)), mode="reflect"), axis=1)
    peak = log_magnitude > (total[:, 33:] - total[:, :-33]) / 33 + np.log(4)
    peak[:, 1:-1] &= (magnitude[:, 1:-1] >= magnitude[:, :-2]) & (
        magnitude[:, 1:-1] >= magnitude[:, 2:]
    )
    n, hold = len(peak), min(hold, len(peak))
    runs = np.lib.stride_tricks.sliding_window_view(peak, hold, axis=0).all(axis=2)
    held = np.zeros_like(peak)
    for k in range(hold):
        held[k : n - hold + 1 + k] |= runs
    # The Hann window spreads a steady tone over its bin and two more on each side.
    for _ in range(2):
        held[:, 1:] |= held[:, :-1].copy()
        held[:, :-1] |= held[:, 1:].copy()
    energy = np.square(magnitude)
    share = energy[held].sum() / max(energy.sum(), LOG_FLOOR)
    return _soft_step(float(share), 0.05, 0.4)


def _speech_likeness(waveform: np.ndarray, sounding: np.ndarray) -> float:
    frames = _frames(waveform, 400, 160)
    spectrum = np.fft.rfft(frames * _hann(400))  # 40 Hz bins, 100 frames per second
    envelope = np.sqrt(np.square(np.abs(spectrum[:, 8:86])).sum(axis=1))  # 320 to 3400 Hz
    mean = envelope.mean()
    if mean <= 0:
        return 0.0
    depth = envelope.std() / mean
    ripple = (envelope / mean - 1) * np.hanning(len(envelope))
    modulation = np.square(np.abs(np.fft.rfft(ripple, 1024)))
    rate_hz = np.arange(len(modulation)) * 100 / 1024
    share = modulation[(rate_hz >= 2) & (rate_hz <= 8)].sum() / max(
        modulation[(rate_hz >= 0.5) & (rate_hz <= 20)].sum(), LOG_FLOOR
    )
    voiced = _voiced(waveform)[: len(sounding)]
    voiced_share = (voiced & sounding[: len(voiced)]).sum() / sounding.sum()
    return (
        _soft_step(share, 0.2, 0.5)
        * _soft_step(depth, 0.3, 0.6)
        * _soft_step(float(voiced_share), 0.1, 0.3)
    )


def _voiced(waveform: np.ndarray) -> np.ndarray:
    """True per 10 ms where the autocorrelation of 40 ms peaks above 0.5 of lag 0 at 70-400 Hz."""
    window = 640
    frames = _frames(waveform, window, 160)
    frames = (frames - frames.mean(axis=1, keepdims=True)) * _hann(window)
    power = np.square(np.abs(np.fft.rfft(frames, 2 * window)))
    correlation = np.fft.irfft(power)[:, : SAMPLE_RATE // 70 + 1]
    taper = np.fft.irfft(np.square(np.abs(np.fft.rfft(_hann(window), 2 * window))))
    correlation = correlation / taper[: correlation.shape[1]]  # undo the window's own decay
    zero_lag = np.maximum(correlation[:, :1], LOG_FLOOR)
    return (correlation[:, SAMPLE_RATE // 400 :] / zero_lag).max(axis=1) > 0.5


def _count_onsets(frames: np.ndarray) -> int:
    """Peaks of the rise of log mel energy from 25 ms frame to frame, hop 10 ms."""
    if len(frames) < 2:
        return 0
    power = np.square(np.abs(np.fft.rfft(frames * _hann(400))))
    # Not `@`: for so small a product, waking the threads of BLAS costs ten times the product.
    power = np.einsum("tf,mf->tm", power, mel_filters(32, 400))
    log_power = np.log(power + 1e-4)  # silence and faint noise stay flat
    # Against two frames back: windows overlap, so a rise takes two hops.
    rise = np.maximum(log_power[2:] - log_power[:-2], 0).mean(axis=1)
    if len(rise) == 0:
        return 0
    reach = 5  # onsets are at least 60 ms apart
    padded = np.pad(rise, reach, constant_values=-1.0)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    first_max = around[:, :reach].max(axis=1) < rise  # ties: the earliest counts
    return int((first_max & (around.max(axis=1) == rise) & (rise > 1.0)).sum())
