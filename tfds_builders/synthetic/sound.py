"""Makes the sound of a scenario: talk under its lines, applause, music swells, a quiet ambience."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tfds_builders.synthetic.scenario import Scenario

SAMPLE_RATE = 16_000  # Hz, mono

# Root mean square of each sound, full scale = 1. Applause and swells are equally loud, so that
# loudness alone does not tell them apart.
_LEVEL = {
    "applause": 0.16,
    "swell": 0.16,
    "talk": 0.035,
    "noise": 0.005,
    "soft music": 0.006,
    "silence": 0.0,
}


def waveform(scenario: Scenario) -> np.ndarray:
    """The whole sound track, float32[n] in [-1, 1] at 16 kHz."""
    rng = scenario.rng("sound")
    track = np.zeros(round(scenario.duration_s * SAMPLE_RATE))
    makers = {
        "applause": _applause,
        "swell": _swell,
        "noise": lambda rng, n: rng.standard_normal(n),
        "soft music": _soft_music,
        "silence": lambda rng, n: np.zeros(n),
    }
    for sound in (*scenario.ambience, *scenario.events):
        _mix(track, rng, sound.start_s, sound.end_s, makers[sound.kind], _LEVEL[sound.kind])
    for line in scenario.lines:
        _mix(track, rng, line.start_s, line.end_s, _talk, _LEVEL["talk"])
    return np.tanh(track).astype(np.float32)


def _mix(
    track: np.ndarray,
    rng: np.random.Generator,
    start_s: float,
    end_s: float,
    maker: Callable[[np.random.Generator, int], np.ndarray],
    level: float,
) -> None:
    """Adds one sound to the track at the given level, with short fades against clicks."""
    start, end = round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
    if end <= start:
        return
    sound = maker(rng, end - start)
    fade = min(round(0.02 * SAMPLE_RATE), len(sound) // 2)
    ramp = np.linspace(0, 1, fade)
    sound[:fade] *= ramp
    sound[len(sound) - fade :] *= ramp[::-1]
    loudness = np.sqrt(np.mean(sound**2))
    if loudness > 0:
        track[start:end] += sound * (level / loudness)


def _seconds(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32) / SAMPLE_RATE


def _applause(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sharp claps about nine times a second over the hiss of a crowd."""
    sound = 0.02 * rng.standard_normal(n)
    clap_n = round(0.06 * SAMPLE_RATE)
    decay = np.exp(-_seconds(clap_n) / 0.012)
    at = 0
    while at < n:
        clap = rng.uniform(0.6, 1.0) * decay * rng.standard_normal(clap_n)
        sound[at : at + clap_n] += clap[: n - at]
        at += round(rng.uniform(0.09, 0.13) * SAMPLE_RATE)
    return sound


def _chord(rng: np.random.Generator, n: int, root_hz: float) -> np.ndarray:
    seconds = _seconds(n)
    sound = np.zeros(n, np.float32)
    for ratio in (1.0, 1.25, 1.5, 2.0):
        for harmonic in (1, 2, 3):
            # Python floats keep the arithmetic in float32, which is several times faster.
            turn = 2 * np.pi * float(root_hz) * ratio * harmonic
            phase = float(rng.uniform(0, 2 * np.pi))
            sound += np.sin(turn * seconds + phase) / harmonic**1.5
    return sound


def _swell(rng: np.random.Generator, n: int) -> np.ndarray:
    """One held chord that rises in a quarter of a second."""
    attack = np.minimum(_seconds(n) / 0.25, 1.0)
    return attack * _chord(rng, n, rng.uniform(130, 260))


def _soft_music(rng: np.random.Generator, n: int) -> np.ndarray:
    """Chords of one and a half seconds that blend into one another."""
    sound = np.zeros(n)
    step = round(1.5 * SAMPLE_RATE)
    for at in range(0, n, step):
        length = min(2 * step, n - at)
        window = np.hanning(2 * step)[:length]
        sound[at : at + length] += window * _chord(rng, length, rng.uniform(130, 260))
    return sound


def _talk(rng: np.random.Generator, n: int) -> np.ndarray:
    """Babble: voiced syllables, four a second, gliding in pitch and in the colour of the vowel."""
    seconds = _seconds(n)
    voice_hz = float(rng.uniform(100, 200))
    sound = np.zeros(n)
    at = 0
    while at < n:
        length = min(round(rng.uniform(0.2, 0.3) * SAMPLE_RATE), n - at)
        part = seconds[:length]
        pitch_hz, glide = voice_hz * float(rng.uniform(0.85, 1.2)), float(rng.uniform(-0.4, 0.4))
        phase = (2 * np.pi * pitch_hz) * (part + glide * part**2)
        formants = ((rng.uniform(350, 800), 120.0), (rng.uniform(900, 2200), 200.0))
        syllable = np.zeros(length, np.float32)
        for harmonic in range(1, 25):
            tone_hz = harmonic * voice_hz
            gain = sum(math.exp(-(((tone_hz - f) / width) ** 2) / 2) for f, width in formants)
            syllable += (0.05 / harmonic + gain) * np.sin(harmonic * phase)
        # A syllable swells and dies in three quarters of its time; the rest is a pause.
        voiced = max(1, round(0.75 * length))
        envelope = np.zeros(length)
        envelope[:voiced] = np.hanning(voiced)
        sound[at : at + length] += envelope * syllable
        at += length
    return sound
