"""Eight simulated devices for every test, and the real data where it is at hand."""

import os
import pathlib

# Before the first import of jax, which reads them once. Eight devices make sharding tests real.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Size of XLA's thread pool, else the number of cores or devices. Threads that wait for another
# device in a collective are taken; where all are, none is left for whom they wait for (XLA aborts).
os.environ.setdefault("NPROC", "64")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # What is compiled here runs for milliseconds, so code is better had soon than fast.
    + " --xla_backend_optimization_level=0"
    # On a loaded machine one of eight devices may keep the others waiting for long.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
).strip()

import jax
import pytest
from jax._src import compilation_cache as _compilation_cache
from jax.experimental.compilation_cache import compilation_cache

from deevisum_jax import config as config_lib
from deevisum_jax import datasets, experiment
from deevisum_jax.data import tokenizer
from tests import checkpoint_files, untrained
from tests.gcs_server import bucket, gcs, gcs_server  # noqa: F401  fixtures

REPO = pathlib.Path(__file__).resolve().parent.parent
TINY_CONFIG = REPO / "configs" / "tiny.py"
# All eight simulated devices, every axis in use.
TINY_MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real videos and annotations (`DEEVISUM_DATA`); tests that need it skip without."""
    folder = os.environ.get("DEEVISUM_DATA")
    if not folder:
        pytest.skip("real data not at hand: DEEVISUM_DATA is not set")
    assert pathlib.Path(folder).is_dir(), f"DEEVISUM_DATA={folder} is no folder"
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """Folder with the built data set `synthetic/tiny`."""
    folder = tmp_path_factory.mktemp("data_sets")
    datasets.Dataset(config_lib.DataConfig(dataset="synthetic/tiny", data_dir=str(folder)))
    return folder


@pytest.fixture(scope="session")
def tiny_config(data_dir):
    """Makes the `Config` of configs/tiny.py with overrides, such as `"data.num_frames=2"`."""

    def make(*overrides: str) -> config_lib.Config:
        return config_lib.from_file(
            str(TINY_CONFIG), (f"data.data_dir={data_dir}", *TINY_MESH, *overrides)
        )

    return make


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run whose model is tiny and has learned nothing."""
    return untrained.make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def other_run(tmp_path, tiny_config) -> pathlib.Path:
    """A run as far as one can start from it, with a tokenizer of its own."""
    folder = tmp_path / "other"
    checkpoint_files.claim(folder, tiny_config())
    experiment.make_template(tiny_config(), folder)
    tokenizer.train_tokenizer(["quite", "another"], folder / "tokenizer.model", vocab_size=280)
    checkpoint_files.with_checkpoint(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """What was compiled; a program is compiled once, however many functions it is traced from.

    Programs stay as they are in memory. jax's cache writes them down, and what XLA reads back has
    lost the order of its collectives on CPUs (each gets a `Resource` of its own, where one is to
    be shared): simulated devices then wait for each other for ever, now and then.
    """
    compiled = {}

    def get(key, compile_options, backend, devices):
        executable, seconds = compiled.get(key, (None, None))
        assert executable is None or set(executable.local_devices()) == set(devices)
        return executable, seconds

    def put(key, module_name, executable, backend, seconds):
        compiled[key] = executable, seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compilation_cache, "get_executable_and_time", get)
        patch.setattr(_compilation_cache, "put_executable_and_time", put)
        # Where nothing is written now; jax does not ask without.
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        yield compiled
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def few_mappings(programs):
    """Forgets programs once a file of tests leaves many behind.

    Each takes some of the 65,530 mappings that Linux gives a process; without any left XLA aborts.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        programs.clear()
        jax.clear_caches()
