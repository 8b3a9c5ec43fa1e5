"""What happens in a synthetic video: a pure description, drawn from a seed.

The title names a subject ("The red ball at the fair"). Every shot shows one or two moving objects
before a background of its own; the subject is in half of the shots. The other objects of the
video, its rivals, have other colours, other names, and are seen just as often, so that only title
and picture together tell where the subject is. Lines are spoken over the video, some of them
announce something ("watch this"): only their text tells which. People clap now and then, and now
and then music swells just as loud: only the sound tells which.

How much a moment matters follows from these three alone, see `importance`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FRAME_RATE = 10  # frames per second of the written video
HEIGHT, WIDTH = 120, 160  # pixels of the written video
POINT_S = 2.0  # seconds between two annotated points, as in TVSum

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("ball", "box", "star")
MOTIONS = {"drift": "drifts", "bounce": "bounces", "circle": "circles"}
GROUNDS = ("grass", "sand", "bricks", "water", "snow", "planks")
AMBIENCES = ("silence", "noise", "soft music")

CATEGORIES = {  # category -> the place that its titles name
    "FA": "fair",
    "BE": "beach",
    "PA": "park",
    "SC": "school",
    "ST": "station",
}
TITLES = (
    "The {subject} at the {place}",
    "A day at the {place} with the {subject}",
    "How the {subject} came to the {place}",
    "The {place} and the {subject}",
    "My {subject} visits the {place}",
)
SALIENT_LINES = (
    "watch this now",
    "here it comes",
    "this is the best part",
    "look at that",
    "do not miss this",
    "watch closely here",
)
NEUTRAL_LINES = (
    "we walked on for a while",
    "the weather stayed dry",
    "it was a long morning",
    "somebody left the door open",
    "they sell tea over there",
    "nothing much to say here",
    "my uncle used to work there",
    "the bus was late again",
)

# What one unit of each cause adds to a moment's importance. Chosen so that the three senses carry
# about the same: the standard deviations of their parts are 0.39, 0.38 and 0.36.
SUBJECT_WEIGHT = 0.7
APPLAUSE_WEIGHT = 0.55
SALIENT_WEIGHT = 0.8
TOGETHER_WEIGHT = 0.6  # applause while the subject is seen

SPLITS = ("train", "validation", "test", "calibration")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What may vary between the videos of a data set."""

    min_duration_s: float = 30.0
    max_duration_s: float = 90.0
    mean_shot_s: float = 3.2
    shot_spread: float = 0.15  # a shot lasts (1 +- spread) times the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actor:
    """One moving object of a shot; lengths are fractions of the picture's height."""

    colour: str
    shape: str
    motion: str
    radius: float
    left: float  # the column range that the object's edge stays in, as fractions of the width
    right: float
    home: tuple[float, float]  # row and column that it moves around, in [0, 1] of where it fits
    speed: float  # radii per second

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    start_frame: int
    end_frame: int  # half-open
    ground: str
    texture_seed: int
    pan: tuple[float, float]  # background motion, rows and columns in pixels per second
    actors: tuple[Actor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    start_s: float
    end_s: float
    text: str
    salient: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sound:
    start_s: float
    end_s: float
    kind: str  # "applause", "swell", or one of AMBIENCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    start_s: float
    end_s: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causes:
    """What makes each annotated point matter; all float64[N] in [0, 1]."""

    subject: np.ndarray  # share of the point's time in which the named subject is seen
    applause: np.ndarray  # share of the point's time in which people clap
    salient: np.ndarray  # 1 where a salient line is spoken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    video_id: str
    key: tuple[int, int, int]  # seed, split, index: every further random draw starts here
    title: str
    category: str
    subject: str
    n_frames: int
    shots: tuple[Shot, ...]
    lines: tuple[Line, ...]
    events: tuple[Sound, ...]
    ambience: tuple[Sound, ...]

    @property
    def duration_s(self) -> float:
        return self.n_frames / FRAME_RATE

    @property
    def num_points(self) -> int:
        return round(self.duration_s / POINT_S)

    @property
    def score_times(self) -> np.ndarray:
        """Centres of the annotated points in seconds, float64[N]."""
        return (np.arange(self.num_points) + 0.5) * POINT_S

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose, so that a change in one leaves the others alone."""
        return np.random.default_rng([*self.key, *purpose.encode()])


def draw_scenario(*, seed: int, split: str, index: int, rules: Rules) -> Scenario:
    """Draws video number `index` of a split; the same arguments give the same video."""
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    spare_s = rules.max_duration_s - rules.min_duration_s
    # Beta(1, 4) has mean 1/5: mostly short videos, a few long ones. Whole points, so that every
    # annotated point is a full one.
    duration_s = POINT_S * round((rules.min_duration_s + spare_s * rng.beta(1, 4)) / POINT_S)
    n_frames = round(duration_s * FRAME_RATE)
    num_points = round(duration_s / POINT_S)

    colours = rng.permutation(COLOURS)[:3]
    cast = tuple((str(c), str(rng.choice(SHAPES))) for c in colours)
    subject = " ".join(cast[0])
    category = str(rng.choice(list(CATEGORIES)))
    title = str(rng.choice(TITLES)).format(subject=subject, place=CATEGORIES[category])
    return Scenario(
        video_id=f"synthetic_{split}_{index:04d}",
        key=key,
        title=title,
        category=category,
        subject=subject,
        n_frames=n_frames,
        shots=_draw_shots(rng, n_frames, cast, rules),
        lines=_draw_lines(rng, num_points),
        events=_draw_events(rng, num_points),
        ambience=_draw_ambience(rng, duration_s),
    )


def _draw_shots(
    rng: np.random.Generator, n_frames: int, cast: tuple[tuple[str, str], ...], rules: Rules
) -> tuple[Shot, ...]:
    num_shots = max(2, round(n_frames / FRAME_RATE / rules.mean_shot_s))
    lengths = rng.uniform(1 - rules.shot_spread, 1 + rules.shot_spread, num_shots)
    borders = np.round(np.cumsum([0, *lengths]) / lengths.sum() * n_frames).astype(int)
    # Exactly half of the shots show the subject, whatever the number of objects in them: neither
    # how many objects are seen nor how often a colour is seen gives it away.
    shows_subject = rng.permutation(np.arange(num_shots) % 2 == 0)
    shots = []
    ground = ""
    for k in range(num_shots):
        # Neighbours differ in ground, so that every cut is plain to see.
        ground = str(rng.choice([g for g in GROUNDS if g != ground]))
        num_actors = int(rng.integers(1, 3))
        rivals = [cast[1 + i] for i in rng.permutation(len(cast) - 1)]
        chosen = ([cast[0]] if shows_subject[k] else []) + rivals
        chosen = [chosen[i] for i in rng.permutation(num_actors)]
        actors = tuple(
            Actor(
                colour=colour,
                shape=shape,
                motion=str(rng.choice(list(MOTIONS))),
                radius=float(rng.uniform(0.17, 0.21)),
                left=i / num_actors,  # side by side: none hides another
                right=(i + 1) / num_actors,
                home=(float(rng.random()), float(rng.random())),
                speed=float(rng.uniform(0.8, 1.6)),
            )
            for i, (colour, shape) in enumerate(chosen)
        )
        angle = rng.uniform(0, 2 * np.pi)
        pan_speed = rng.uniform(2, 6)
        shots.append(
            Shot(
                start_frame=int(borders[k]),
                end_frame=int(borders[k + 1]),
                ground=ground,
                texture_seed=int(rng.integers(2**31)),
                pan=(float(pan_speed * np.sin(angle)), float(pan_speed * np.cos(angle))),
                actors=actors,
            )
        )
    return tuple(shots)


def _draw_runs(
    rng: np.random.Generator, num_points: int, shares: dict[str, float], lengths: tuple[int, ...]
) -> list[tuple[str, int, int]]:
    """Fills the points with runs `(kind, start, end)`, each kind in about its share of them."""
    num_runs = int(np.ceil(num_points / np.mean(lengths))) + len(shares)
    kinds = []
    for kind, share in shares.items():
        kinds += [kind] * max(1, round(share * num_runs))
    runs = []
    start = 0
    while start < num_points:
        # One shuffled deck after another, so that short videos get their share of each kind too.
        for kind in rng.permutation(kinds):
            end = min(start + int(rng.choice(lengths)), num_points)
            if start < end:
                runs.append((str(kind), start, end))
            start = end
    return runs


def _draw_events(rng: np.random.Generator, num_points: int) -> tuple[Sound, ...]:
    runs = _draw_runs(rng, num_points, {"applause": 0.3, "swell": 0.2, "": 0.5}, (1, 2, 3))
    duration_s = num_points * POINT_S
    events = []
    for kind, start, end in runs:
        # Near the grid of points, so that a point is nearly always all applause or none.
        start_s = start * POINT_S + rng.uniform(-0.2, 0.2)
        end_s = end * POINT_S + rng.uniform(-0.2, 0.2)
        if kind:
            bounds = np.clip([start_s, end_s], 0, duration_s)
            events.append(Sound(start_s=float(bounds[0]), end_s=float(bounds[1]), kind=kind))
    return tuple(events)


def _draw_lines(rng: np.random.Generator, num_points: int) -> tuple[Line, ...]:
    runs = _draw_runs(rng, num_points, {"salient": 0.3, "neutral": 0.35, "": 0.35}, (1, 1, 2))
    lines = []
    for kind, start, end in runs:
        # Inside its points with a pause at either end: a line belongs to whole points.
        start_s = start * POINT_S + rng.uniform(0.1, 0.3)
        end_s = end * POINT_S - rng.uniform(0.1, 0.3)
        if kind:
            salient = kind == "salient"
            text = str(rng.choice(SALIENT_LINES if salient else NEUTRAL_LINES))
            # Whole milliseconds: what the subtitle file holds.
            lines.append(
                Line(start_s=round(start_s, 3), end_s=round(end_s, 3), text=text, salient=salient)
            )
    return tuple(lines)


def _draw_ambience(rng: np.random.Generator, duration_s: float) -> tuple[Sound, ...]:
    sounds = []
    start_s = 0.0
    while start_s < duration_s:
        end_s = min(start_s + float(rng.uniform(5, 12)), duration_s)
        sounds.append(Sound(start_s=start_s, end_s=end_s, kind=str(rng.choice(AMBIENCES))))
        start_s = end_s
    return tuple(sounds)


def _overlap(spans: list[tuple[float, float]], num_points: int) -> np.ndarray:
    """Share of each point's time that the spans (disjoint, in seconds) cover, float64[N]."""
    starts = np.arange(num_points) * POINT_S
    share = np.zeros(num_points)
    for start_s, end_s in spans:
        covered = np.minimum(starts + POINT_S, end_s) - np.maximum(starts, start_s)
        share += np.maximum(covered, 0) / POINT_S
    return share


def causes(scenario: Scenario) -> Causes:
    """What makes each point of the video matter."""
    n = scenario.num_points
    seen = [
        (shot.start_frame / FRAME_RATE, shot.end_frame / FRAME_RATE)
        for shot in scenario.shots
        if any(actor.name == scenario.subject for actor in shot.actors)
    ]
    clapping = [(e.start_s, e.end_s) for e in scenario.events if e.kind == "applause"]
    salient = [(line.start_s, line.end_s) for line in scenario.lines if line.salient]
    return Causes(
        subject=_overlap(seen, n),
        applause=_overlap(clapping, n),
        salient=(_overlap(salient, n) > 0).astype(float),
    )


def importance(causes: Causes) -> np.ndarray:
    """How much each point matters to everybody, float64[N] in [0, 2.65].

    `0.7 subject + 0.55 applause + 0.8 salient + 0.6 subject * applause`
    """
    return (
        SUBJECT_WEIGHT * causes.subject
        + APPLAUSE_WEIGHT * causes.applause
        + SALIENT_WEIGHT * causes.salient
        + TOGETHER_WEIGHT * causes.subject * causes.applause
    )


def captions(scenario: Scenario) -> list[Caption]:
    """One plain sentence per point: what is seen in its middle, and what is heard."""
    applause = causes(scenario).applause
    swell = [(e.start_s, e.end_s) for e in scenario.events if e.kind == "swell"]
    music = _overlap(swell, scenario.num_points)
    sentences = []
    for k, time_s in enumerate(scenario.score_times):
        frame = round(time_s * FRAME_RATE)
        shot = next(s for s in scenario.shots if s.start_frame <= frame < s.end_frame)
        seen = " and ".join(f"a {a.name} {MOTIONS[a.motion]}" for a in shot.actors)
        heard = ""
        if applause[k] > 0.5:
            heard = " while people clap"
        elif music[k] > 0.5:
            heard = " while loud music plays"
        sentences.append(
            Caption(
                start_s=float(time_s - POINT_S / 2),
                end_s=float(time_s + POINT_S / 2),
                text=f"{seen} over {shot.ground}{heard}",
            )
        )
    return sentences
