"""Keyframes of a video of any length, found while it is decoded.

Sampled frames are embedded in chunks of one size, the device works on one chunk while the next is
decoded, and of every frame only its embedding stays. When the video is over, differential keyframe
selection (`keyframes.selection`) picks the frames that answer a query, or tell the video where
there is none, and differ from each other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import selection
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models import pytree, two_towers
from deevisum_jax.models.paligemma2 import PaliGemma2Config
from deevisum_jax.models.pytree import Params
from deevisum_jax.models.siglip import Siglip
from deevisum_jax.models.two_towers import ImageTower, TwoTowersConfig
from deevisum_jax.sharding import batch_sharding, make_mesh
from deevisum_jax.typing import Array

_PER_DEVICE = 16  # frames of a chunk; of SigLIP So400m/14 at 384 pixels they need 0.6 GB
_AHEAD = 2  # chunks that the device may have before it while the next are decoded
_ROOM = 1024  # frames; selection is compiled for few numbers of frames, which are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a video's sampled frames."""

    relevance: np.ndarray  # float32[N], cosine with the query's embedding, or with the mean frame's
    index: np.ndarray  # int32[K] of the keyframes, in order of time; K is at most N
    is_filled: np.ndarray  # bool[K], 1 = taken to use the budget, too like a frame kept before it


class KeyframeFinder:
    """Finds keyframes of any number of videos; several threads may do so at a time."""

    def __init__(
        self,
        encode: Callable[[Params, Array], Array],
        params: Params,
        *,
        image_size: int,
        resize: str,
        config: SelectionConfig,
        mesh: Mesh,
        query: np.ndarray | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          encode: makes float32[B, D] of the parameters and uint8[B, H, W, 3].
          params: its parameters, whole on every device of the mesh. So nothing travels between
            devices, and programs of several threads cannot wait for each other.
          image_size: H = W, pixels.
          resize: how pictures come to it, bilinear or bicubic.
          config: how many keyframes, and what they are chosen by.
          mesh: of `device_mesh`; frames are split over it.
          query: float[D], what is looked for; None = what is like the video's mean frame.
        """
        self.image_size, self.resize, self.config = image_size, resize, config
        self._params, self._query = params, query
        self._chunk_size = _PER_DEVICE * mesh.size
        self._encode = jax.jit(
            encode,
            in_shardings=(on_every_device(mesh), batch_sharding(mesh)),
            out_shardings=batch_sharding(mesh),
        )

    def watch(self) -> Watch:
        """Begins a video."""
        embed = functools.partial(self._encode, self._params)
        return Watch(embed, self._chunk_size, self.find)

    def find(self, embeddings: np.ndarray, places: np.ndarray) -> Found:
        """The keyframes of a video.

        Args:
          embeddings: float32[P, D], of its pictures.
          places: int[N], which of them each frame shows.

        Raises:
          UserError: there are no frames, or an embedding is no number.
        """
        N = len(places)
        # At most an eighth is filling, in a long video.
        step = max(_ROOM, 2 ** (N.bit_length() - 4))
        valid = np.arange(-(-N // step) * step) < N
        padded = np.zeros((len(valid), embeddings.shape[1]), np.float32)
        # "clip" for no copy on the way.
        np.take(embeddings, places, axis=0, out=padded[:N], mode="clip")
        try:
            selection.check_embeddings(padded[:N])
        except UserError as error:
            raise UserError(
                "the image tower that looks for keyframes gives no numbers; its weights are "
                f"damaged, so get them again, or train the run again ({error})"
            ) from error
        # Memory is taken for all keyframes asked for, and there are no more than frames.
        slots = min(self.config.num_keyframes, len(valid))
        config = dataclasses.replace(self.config, num_keyframes=slots)
        relevance, chosen = jax.device_get(_select(padded, self._query, valid, config=config))
        return Found(
            relevance=relevance[:N],
            index=chosen.index[chosen.is_used],
            is_filled=chosen.is_filled[chosen.is_used],
        )


class Watch:
    """One video on its way through the image tower."""

    def __init__(
        self,
        embed: Callable[[np.ndarray], Array],
        chunk_size: int,
        find: Callable[[np.ndarray, np.ndarray], Found],
    ) -> None:
        """Begins.

        Args:
          embed: float[B, D] of a chunk.
          chunk_size: B, pictures.
          find: as `KeyframeFinder.find`.
        """
        self._embed, self._find, self._chunk_size = embed, find, chunk_size
        self._chunk: list[np.ndarray] = []
        self._asked: collections.deque[tuple[int, Array]] = collections.deque()
        self._told: list[np.ndarray] = []
        self._places: list[int] = []  # of each frame, among the pictures embedded
        self._last: np.ndarray | None = None
        self._num_pictures = 0

    def see(self, picture: np.ndarray) -> None:
        """Takes the next frame, uint8[H, W, 3]; the object before once more costs nothing."""
        if picture is not self._last:
            self._chunk.append(picture)
            self._last, self._num_pictures = picture, self._num_pictures + 1
        self._places.append(self._num_pictures - 1)
        if len(self._chunk) == self._chunk_size:
            self._ask()
            while len(self._asked) > _AHEAD:
                self._read()

    def finish(self) -> Found:
        """The keyframes of what was seen.

        Raises:
          UserError: an embedding is no number.
        """
        if self._chunk:
            self._ask()
        while self._asked:
            self._read()
        embeddings, self._told = np.concatenate(self._told), []
        return self._find(embeddings, np.array(self._places))

    def _ask(self) -> None:
        # A new array for every chunk: the device may still be reading the one before.
        chunk = np.zeros((self._chunk_size, *self._chunk[0].shape), np.uint8)
        chunk[: len(self._chunk)] = self._chunk
        self._asked.append((len(self._chunk), self._embed(chunk)))
        self._chunk = []

    def _read(self) -> None:
        count, embeddings = self._asked.popleft()
        self._told.append(np.asarray(embeddings)[:count])


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One over which frames are split, and parameters are not; None = this process's devices."""
    devices = jax.local_devices() if devices is None else devices
    return make_mesh(data=len(devices), fsdp=1, devices=devices)


def on_every_device(mesh: Mesh) -> NamedSharding:
    """Whole on each of them."""
    return NamedSharding(mesh, P())


def by_query(
    model: TwoTowersConfig,
    params: Params,
    tokens: np.ndarray,
    *,
    resize: str,
    config: SelectionConfig,
    mesh: Mesh,
) -> KeyframeFinder:
    """Finds the frames that a text is about.

    Args:
      model: a SigLIP with both towers.
      params: its parameters, whole on every device of the mesh. Those of the text tower are not
        kept.
      tokens: int32[T], the query, as `siglip_text` makes them.
      resize: how the model wants pictures resized.
      config: of the selection.
      mesh: of `device_mesh`.
    """

    @jax.jit
    def encode_text(params: Params, tokens: Array) -> jax.Array:
        return two_towers.bind(model, params).encode_text(tokens[None])[0]

    return KeyframeFinder(
        functools.partial(_encode_for_query, model),
        params["img"],
        image_size=model.img.image_size,
        resize=resize,
        config=config,
        mesh=mesh,
        query=np.asarray(encode_text(params, tokens)),
    )


def by_mean(
    model: PaliGemma2Config,
    params: Params,
    *,
    resize: str,
    config: SelectionConfig,
    mesh: Mesh,
) -> KeyframeFinder:
    """Finds frames that are like the whole video, by what the student's image tower makes of them.

    Args:
      model: of the student.
      params: its parameters; the image tower's are copied to every device.
      resize: how the student wants pictures resized.
      config: of the selection.
      mesh: of `device_mesh`.
    """
    return KeyframeFinder(
        functools.partial(_encode_for_mean, model),
        jax.device_put(params["img"], on_every_device(mesh)),
        image_size=model.img.image_size,
        resize=resize,
        config=config,
        mesh=mesh,
    )


def segment_relevance(
    relevance: np.ndarray, frame_times: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """Of each segment that of the most relevant frame on screen in it.

    Args:
      relevance: float[N].
      frame_times: float[N], seconds from 0, ascending; a frame is on screen until the next.
      bounds: float[M, 2], seconds.

    Returns:
      float[M].
    """
    first = np.searchsorted(frame_times, bounds[:, 0], side="right") - 1
    stop = np.searchsorted(frame_times, bounds[:, 1], side="left")
    return np.array([relevance[a:b].max() for a, b in zip(first, stop, strict=True)])


def focus(importance: np.ndarray, relevance: np.ndarray, weight: float) -> np.ndarray:
    """Scores with a query: `(1 - weight) * importance + weight * relevance`, float[M].

    Args:
      importance: float[M] in [0, 1].
      relevance: float[M], any scale: the least of the video becomes 0, the greatest 1. Where all
        are equal, 0.5 stands for each, which leaves the order to importance.
      weight: of the query, in [0, 1].
    """
    spread = np.ptp(relevance)
    scaled = (relevance - relevance.min()) / spread if spread else np.full(relevance.shape, 0.5)
    return (1 - weight) * importance + weight * scaled


@functools.partial(jax.jit, static_argnames="config")
def _select(
    embeddings: Array, query: Array | None, valid: Array, *, config: SelectionConfig
) -> tuple[jax.Array, selection.Keyframes]:
    chosen = selection.select(embeddings, query, valid, config=config)
    return selection.relevance(embeddings, query, valid), chosen


def _encode_for_query(model: TwoTowersConfig, params: Params, frames: Array) -> jax.Array:
    """uint8[B, H, W, 3] -> float32[B, E]; not of length 1, which cosines do not need."""
    tower = pytree.bind(_two_towers_image_tower, model, params)
    return tower(_pixels(frames, model.dtype)).astype(jnp.float32)


def _encode_for_mean(model: PaliGemma2Config, params: Params, frames: Array) -> jax.Array:
    """uint8[B, H, W, 3] -> float32[B, D], the mean of a frame's patches."""
    tower = pytree.bind(_student_image_tower, model, params)
    return tower.encode(_pixels(frames, model.dtype)).astype(jnp.float32).mean(axis=1)


def _pixels(frames: Array, dtype: str) -> jax.Array:
    """As both models scale them."""
    return (jnp.asarray(frames, jnp.float32) / 127.5 - 1.0).astype(dtype)


def _two_towers_image_tower(model: TwoTowersConfig, *, rngs: nnx.Rngs) -> ImageTower:
    return ImageTower(model.img, param_dtype=model.param_dtype, rngs=rngs)


def _student_image_tower(model: PaliGemma2Config, *, rngs: nnx.Rngs) -> Siglip:
    width = model.llm.width
    return Siglip(model.img, out_width=width, param_dtype=model.param_dtype, rngs=rngs)
