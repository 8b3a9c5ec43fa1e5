"""Eight simulated devices for every test, and the real data where it is at hand."""

import os
import pathlib

# Before the first import of jax, which reads both once. Eight devices make every sharding test real.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real videos and annotations (`DEEVISUM_DATA`); tests that need it skip without."""
    folder = pathlib.Path(os.environ.get("DEEVISUM_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not at hand: {folder} is no folder (set DEEVISUM_DATA)")
    return folder
