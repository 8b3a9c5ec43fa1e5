r"""Whether keyframes hold what is asked for: `python scripts/haystack.py`.

Needles, clips of 2 to 10 seconds, are hidden among thousands of frames of other videos. A frame of
the clip that is not hidden asks for it, and K frames are chosen: by keyframe selection as it is in
this package (DKS), and by other ways. Further tables have several needles in each haystack, asked
for together by the mean of their queries. Prints Markdown.

    python scripts/haystack.py                                     # made-up embeddings
    python scripts/haystack.py --features features.h5              # the community's HDF5 layout
    python scripts/haystack.py --videos DIR --model siglip_folder  # frames of files, embedded here

All ways choose from the same haystacks. Recalls are means over seeds, in per cent, with the least
and the greatest of a seed.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import h5py
import jax
import numpy as np

from deevisum_jax.convert import two_towers as released
from deevisum_jax.data import video as video_files
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.keyframes import baselines, haystack, selection
from deevisum_jax.keyframes.haystack import Found, HaystackConfig, Method, SceneConfig
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models import two_towers
from tfds_builders import downloads

_BATCH = 32  # frames that are embedded at once


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/haystack.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--features", metavar="FILE", help="HDF5, a group for each video with `features` [T, D]")
    add("--videos", metavar="DIR", help="a folder of video files")
    add("--model", metavar="FOLDER", help="SigLIP's weights for --videos, Hugging Face's folder "
        "(default: freshly drawn ones, which have learned nothing)")  # fmt: skip
    add("--variant", help="sizes of a model with fresh weights (siglip_tiny)")
    add("--frame_rate", type=float, default=2.0, metavar="FPS",
        help="of the features, or at which files are sampled (%(default)s)")  # fmt: skip
    add("--frames", type=int, nargs="+", default=[2000, 5000, 10000], metavar="N",
        help="lengths of haystacks (2000 5000 10000)")  # fmt: skip
    add("--needle_s", type=float, nargs=2, default=[2.0, 10.0], metavar="SECONDS",
        help="shortest and longest needle (2 10)")  # fmt: skip
    add("--haystacks", type=int, default=40, help="of each seed, with one needle (%(default)s)")
    add("--together", type=int, nargs="+", default=[4, 8], metavar="M",
        help="needles of a haystack in the other tables (4 8; 1: no more tables)")  # fmt: skip
    add("--seeds", type=int, default=5, help="(%(default)s)")
    add("--num_keyframes", type=int, default=32, metavar="K", help="(%(default)s)")
    add("--tau", type=float, default=SelectionConfig().tau,
        help="a frame repeats a kept one if their cosine is greater (%(default)s)")  # fmt: skip
    add("--mmr_lambda", type=float, nargs="+", default=[0.3, 0.7], metavar="LAMBDA",
        help="weight of relevance in maximal marginal relevance (0.3 0.7)")  # fmt: skip
    add("--center", action="store_true", help="take the mean of all videos off the embeddings")
    args = parser.parse_args(argv)
    if args.features and args.videos:
        parser.error("give --features or --videos, not both")
    if not args.videos:
        for name in ("model", "variant"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is of a model that embeds --videos")
    if args.model and args.variant:
        parser.error("--variant is of fresh weights; a --model has sizes of its own")
    for name in ("seeds", "haystacks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    for weight in args.mmr_lambda:
        if not 0 <= weight <= 1:
            parser.error(f"--mmr_lambda {weight:g}: give shares in [0, 1]")

    # What needs no videos to be refused is refused before any is embedded.
    config = SelectionConfig(num_keyframes=args.num_keyframes, tau=args.tau)
    ways = methods(config, args.mmr_lambda)
    tables = {
        m: [
            HaystackConfig(
                num_frames=n, frame_rate=args.frame_rate, needle_s=tuple(args.needle_s),
                num_needles=m,
            )
            for n in sorted(set(args.frames))
        ]
        for m in dict.fromkeys((1, *args.together))
    }  # fmt: skip
    videos, words = embeddings(args)
    for haystacks in tables.values():
        for each in haystacks:
            haystack.check(videos, each)
    if args.center:
        videos, words = haystack.centred(videos), f"{words}; less their mean"
    print(about(videos, words))
    for m, haystacks in tables.items():
        count = -(-args.haystacks // m)  # about as many needles in all tables
        found = {
            each.num_frames: [
                haystack.search(videos, ways, each, num_haystacks=count, seed=seed)
                for seed in range(args.seeds)
            ]
            for each in haystacks
        }
        needles = "one needle" if m == 1 else f"{m} needles, asked for together,"
        print(
            f"\n{args.seeds} seeds x {count} haystacks with {needles} of {args.needle_s[0]:g} to "
            f"{args.needle_s[1]:g} s at {args.frame_rate:g} frames per second; "
            f"K = {args.num_keyframes}, tau = {args.tau:g}\n\n{table(found)}",
            flush=True,
        )
    return 0


def methods(config: SelectionConfig, mmr_lambdas: Sequence[float]) -> dict[str, Method]:
    """Ways to choose keyframes, by the names that the tables have."""
    K = config.num_keyframes

    select = functools.partial(selection.select, config=config)

    def walk(frames: np.ndarray, query: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        found = select(frames, query)
        return np.asarray(found.index)[np.asarray(found.is_used & ~found.is_filled)]

    def dks(frames: np.ndarray, query: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        found = select(frames, query)
        return np.asarray(found.index)[np.asarray(found.is_used)]

    return {
        "DKS": dks,
        "DKS, budget not filled": walk,
        "most relevant K": lambda frames, query, rng: baselines.top_k(frames, query, K),
        **{
            f"MMR, lambda {weight:g}": lambda frames, query, rng, weight=weight: (
                baselines.maximal_marginal_relevance(frames, query, K, relevance_weight=weight)
            )
            for weight in mmr_lambdas
        },
        "K-means": lambda frames, query, rng: baselines.k_means(frames, K, rng),
        "uniform": lambda frames, query, rng: baselines.uniform(len(frames), K),
    }


def embeddings(args: argparse.Namespace) -> tuple[list[np.ndarray], str]:
    """float[T, D] of each video, and what they are in words."""
    if args.features:
        return read_features(args.features), f"`features` of {pathlib.Path(args.features).name}"
    if args.videos:
        return embed_videos(args)
    config = SceneConfig()
    return haystack.draw_scenes(config, np.random.default_rng(0)), f"made up: {config}"


def read_features(path: str) -> list[np.ndarray]:
    """float[T, D] of each video of an HDF5 file, in the order of the groups' names.

    Raises:
      UserError: no such file, or not such a file.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path} is no file; give an HDF5 file of features")
    try:
        file = h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} is not an HDF5 file ({error}); download it again") from None
    videos = []
    with file:
        for key, group in file.items():
            field = group.get("features") if isinstance(group, h5py.Group) else None
            if not isinstance(field, h5py.Dataset) or field.ndim != 2 or field.dtype.kind != "f":
                raise UserError(
                    f"{path}, {key!r}: no group of a video with `features`, a table of numbers "
                    "[frames, width]; take a file in the community's layout"
                )
            try:
                videos.append(field[()].astype(np.float32))
            except OSError as error:
                raise UserError(f"{path}, {key!r} is damaged ({error})") from None
    return videos


def embed_videos(args: argparse.Namespace) -> tuple[list[np.ndarray], str]:
    """float32[T, E] of each file of a folder by SigLIP's image tower, and what they are in words.

    Raises:
      UserError: no such folder, a file that is no video, or a model that cannot be loaded.
    """
    folder = pathlib.Path(args.videos)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one of video files")
    paths = downloads.list_files(folder, downloads.VIDEO_ENDINGS)
    if not paths:
        raise UserError(f"{folder} holds no video files")
    if args.model:
        config = released.read_config(args.model)
        params, _ = released.load(args.model, config)
        resize = released.read_resize(args.model, config.img.image_size)
        model = pathlib.Path(args.model).name
    else:
        name = args.variant or "siglip_tiny"
        config = two_towers.get_config(name)
        params = two_towers.init_params(config, jax.random.key(0))
        resize = "bilinear"
        model = f"{name} with freshly drawn weights, which have learned nothing"
    encode = jax.jit(lambda frames: two_towers.bind(config, params).encode_image(frames))
    size = config.img.image_size
    videos = [embed_file(path, encode, size, resize, args.frame_rate) for path in paths]
    return videos, f"frames of {len(paths)} files by {model}"


def embed_file(
    path: pathlib.Path,
    encode: Callable[[np.ndarray], jax.Array],
    size: int,
    resize: str,
    frame_rate: float,
) -> np.ndarray:
    """float32[T, E] of a file, without all its frames ever being there.

    Args:
      path: the file.
      encode: uint8[B, size, size, 3] to float32[B, E]; always called with as many frames.
      size: pixels, height and width.
      resize: bilinear or bicubic.
      frame_rate: frames per second.

    Raises:
      UserError: as `data.video.show_video`.
    """
    rows: list[np.ndarray] = []
    waiting: list[np.ndarray] = []

    def embed() -> None:
        batch = np.zeros((_BATCH, size, size, 3), np.uint8)
        batch[: len(waiting)] = waiting
        rows.append(np.asarray(encode(batch))[: len(waiting)])
        waiting.clear()

    def see(frame: np.ndarray) -> None:
        waiting.append(frame)
        if len(waiting) == _BATCH:
            embed()

    video_files.show_video(path, see, frame_rate=frame_rate, size=(size, size), resize=resize)
    if waiting:
        embed()
    return np.concatenate(rows)


def about(videos: Sequence[np.ndarray], words: str) -> str:
    """What the embeddings are, in a paragraph of Markdown."""
    quantiles = haystack.cosine_quantiles(videos, np.random.default_rng(0))
    cosines = "; ".join(
        f"{name} {' '.join(f'{value:.3f}' for value in row)}" for name, row in quantiles.items()
    )
    return (
        f"{len(videos)} videos, {sum(map(len, videos)):,} frames, embeddings of width "
        f"{videos[0].shape[1]}: {words}. Cosines (5 %, 50 %, 95 %): {cosines}."
    )


def table(found: Mapping[int, Sequence[Mapping[str, Found]]]) -> str:
    """Markdown: recall by length of the haystack, and what the choice in the longest is like.

    Args:
      found: by length, what `haystack.search` gave for each seed.
    """
    longest = found[max(found)]
    lines = [
        "| method | " + " | ".join(f"recall, {n:,} frames" for n in found)
        + " | videos among the keyframes | mean cosine of two |",
        "|---|" + "---|" * (len(found) + 2),
    ]  # fmt: skip
    for name in longest[0]:
        cells = [name]
        for seeds in found.values():
            recalls = [100 * seed[name].recall for seed in seeds]
            mean = statistics.mean(recalls)
            cells.append(f"{mean:.1f} ({min(recalls):.1f} to {max(recalls):.1f})")
        cells.append(f"{statistics.mean(seed[name].num_videos for seed in longest):.1f}")
        cells.append(f"{statistics.mean(seed[name].redundancy for seed in longest):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
