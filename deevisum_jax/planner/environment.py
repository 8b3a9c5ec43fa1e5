"""What a process needs that compiles for TPUs and has none."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental import topologies

from deevisum_jax.errors import UserError
from deevisum_jax.planner.chips import Topology

_ENVIRONMENT = {
    # Else a second process that compiles is refused by the library's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else it looks for the metadata server of a TPU machine, and complains.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Errors and worse.
    "TPU_STDERR_LOG_LEVEL": "2",
    "TPU_MIN_LOG_LEVEL": "2",
}


def prepare() -> None:
    """Sets the environment; to be called before anything touches jax's devices.

    Raises:
      UserError: libtpu is not installed, or not the one that goes with jax.
    """
    wanted = wanted_libtpu()
    install = f"install it with: pip install '{wanted}'"
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the TPU compiler, libtpu, is not installed; {install}") from None
    version = wanted.removeprefix("libtpu==")
    if not re.fullmatch(re.escape(version).replace(r"\*", r".*"), f"{found}.0"):
        raise UserError(
            f"libtpu {found} does not go with jax {jax.__version__}, which wants {version}; "
            f"{install}"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Where there are TPUs they are left to others.
    jax.config.update("jax_platforms", "cpu")


def wanted_libtpu() -> str:
    """What the installed jax asks for as its extra `tpu`, for instance `libtpu==0.0.42.*`."""
    for line in importlib.metadata.requires("jax") or ():
        if found := re.match(r"(libtpu==[\d.*]+)", line.replace(" ", "")):
            return found[1]
    raise AssertionError("jax names no libtpu")


@functools.cache
def devices(topology: Topology) -> Sequence[jax.Device]:
    """The chips of a slice, to compile for.

    Raises:
      UserError: the compiler does not know the slice.
    """
    # Two cores of a v4 are one device, as on the machines one rents.
    options = {"chip_config_name": "megacore"} if topology.chip.kind == "v4" else {}
    if topology.num_chips == 1:  # else a host has four of them
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with held_stderr() as drop:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name, **options
            )
            drop()
            return described.devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"libtpu gives no topology {topology.name}: {str(error).splitlines()[0]}"
        ) from None


@contextlib.contextmanager
def held_stderr() -> Iterator[Callable[[], None]]:
    """Keeps back what native code writes to stderr; gives a function that drops it.

    What is not dropped is shown at the end.
    """
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield lambda: os.ftruncate(said.fileno(), 0)
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            said.seek(0)
            os.write(shown, said.read().lstrip(b"\0"))
            os.close(shown)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps what is compiled out of jax's cache on disk.

    There is no chip to load it, and a second process would be warned of that.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", sys.float_info.max)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
