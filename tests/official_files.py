"""TVSum and SumMe as they are downloaded, made small: every video but the given ones lasts 2 s."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import h5py
import numpy as np
import scipy.io

from tfds_builders.summe import annotations as summe
from tfds_builders.tvsum import annotations as tvsum

FPS = 30
NUM_USERS = 3


def scores_of(n_frames: int, seed: int = 0) -> np.ndarray:
    """float64[U, n_frames]: whole scores from 1 to 5, held for two seconds."""
    rng = np.random.default_rng(seed)
    points = rng.integers(1, 6, (NUM_USERS, -(-n_frames // (2 * FPS))))
    return points.repeat(2 * FPS, axis=1)[:, :n_frames].astype(np.float64)


def tvsum_scores(given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Scores of every video: the given ones, and 60 frames of the others."""
    given = given or {}
    return {
        video_id: given.get(video_id, scores_of(2 * FPS, seed))
        for seed, video_id in enumerate(tvsum.VIDEO_IDS)
    }


def write_tvsum_mat(
    path: pathlib.Path, scores: Mapping[str, np.ndarray], *, without: Sequence[str] = ()
) -> pathlib.Path:
    """A ydata-tvsum50.mat: columns of references to cells, text as UTF-16 codes in a column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        cells = file.create_group("#refs#")
        table = file.create_group("tvsum50")

        def text(value: str) -> np.ndarray:
            return np.array([[ord(letter)] for letter in value], np.uint16)

        columns: dict[str, list[np.ndarray]] = {
            "video": [text(video_id) for video_id in scores],
            "title": [text(f"Film {k}") for k in range(len(scores))],
            "category": [text("VT") for _ in scores],
            "length": [np.array([[row.shape[1] / FPS]]) for row in scores.values()],
            "nframes": [np.array([[float(row.shape[1])]]) for row in scores.values()],
            "user_anno": list(scores.values()),
        }
        for name, values in columns.items():
            if name in without:
                continue
            made = [
                cells.create_dataset(f"{name}{k}", data=value).ref for k, value in enumerate(values)
            ]
            table.create_dataset(name, data=np.array([made], h5py.ref_dtype).T)
    return path


def write_tvsum_tsv(folder: pathlib.Path, videos: Sequence[tvsum.VideoAnnotation]) -> None:
    """The two tables: a row of scores for each annotator, lengths in whole seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    anno = [
        f"{video.video_id}\t{video.category}\t{','.join(f'{score:g}' for score in row)}\n"
        for video in videos
        for row in video.user_scores
    ]
    info = ["category\tvideo_id\ttitle\turl\tlength\n"]
    for video in videos:
        minutes, seconds = divmod(round(video.length_s), 60)
        url = f"https://www.youtube.com/watch?v={video.video_id}"
        info.append(
            f"{video.category}\t{video.video_id}\t{video.title}\t{url}\t{minutes}:{seconds:02}\n"
        )
    (folder / "ydata-tvsum50-anno.tsv").write_text("".join(anno))
    (folder / "ydata-tvsum50-info.tsv").write_text("".join(info))


def write_summe_mat(path: pathlib.Path, n_frames: int = 2 * FPS, **changed: object) -> None:
    """A GT/*.mat of three people, who chose frames 0 to 9, 10 to 19 and 20 to 29 as third part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = np.zeros((n_frames, NUM_USERS), np.uint8)
    for user in range(NUM_USERS):
        chosen[10 * user : 10 * user + 10, user] = 3
    content = {
        "user_score": chosen, "nFrames": n_frames, "FPS": FPS,
        "video_duration": n_frames / FPS + 0.5, "gt_score": chosen.mean(axis=1),
    }  # fmt: skip
    content |= changed
    scipy.io.savemat(path, {name: value for name, value in content.items() if value is not None})


def write_summe_gt(folder: pathlib.Path, n_frames: Mapping[str, int] | None = None) -> None:
    """All 25 files of annotations."""
    for video_id in summe.VIDEO_IDS:
        write_summe_mat(folder / f"{video_id}.mat", (n_frames or {}).get(video_id, 2 * FPS))


def write_features(
    path: pathlib.Path, video_ids: Sequence[str], *, named: bool = True, n_frames: int = 2 * FPS
) -> pathlib.Path:
    """The community's HDF5 layout: video k has the features k, two shots, four picks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = n_frames // 2
    with h5py.File(path, "w") as file:
        for k, video_id in enumerate(video_ids):
            group = file.create_group(f"video_{k + 1}")
            picks = np.arange(4) * (n_frames // 4)
            group["features"] = np.full((4, 8), k, np.float32)
            group["gtscore"] = np.linspace(0, 1, 4)
            group["picks"] = picks
            group["n_steps"] = len(picks)
            group["n_frames"] = n_frames
            group["change_points"] = np.array([[0, half - 1], [half, n_frames - 1]])
            group["n_frame_per_seg"] = np.array([half, n_frames - half])
            summary = np.zeros((NUM_USERS, n_frames), np.float32)
            summary[:, :5] = 1
            group["user_summary"] = summary
            if named:
                group["video_name"] = video_id
    return path
