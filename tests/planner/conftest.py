"""The mark of tests that ask the TPU compiler, and a mesh for those that do not."""

import jax
import pytest

from deevisum_jax import sharding


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "tpu_backend: compiles for TPUs, with libtpu and without a TPU"
    )


@pytest.fixture(scope="module")
def mesh():
    """Eight parts of everything, on devices that are there."""
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    with jax.set_mesh(mesh):
        yield mesh
