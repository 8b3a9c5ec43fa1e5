"""The mark of tests that ask the TPU compiler."""


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "tpu_backend: compiles for TPUs, with libtpu and without a TPU"
    )
