"""Google Cloud Storage on this machine, for whatever reads or writes `gs://` addresses.

Its fixtures come with conftest.py.
"""

from __future__ import annotations

import functools
import http.server
import logging
import threading
import uuid
from collections.abc import Iterator
from http import HTTPStatus

import gcp_storage_emulator.server as emulator
import pytest
from etils import epath
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

from deevisum_jax import files

READ_ONLY = "read-only"  # a bucket in which nobody may write

# Where the clients look: gcsfs (files, etils) and tensorstore (Orbax's arrays).
_VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class _Server(http.server.ThreadingHTTPServer):
    """The emulator's own takes one connection at a time, and a process may hold several."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that was killed, or has read enough, closes its side; that is no error."""


class Gcs(Storage):
    """What the server holds, and what it may be asked in tests."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.address = ""
        self.written: list[str] = []  # names of objects, in the order in which they appeared
        self.refuses = ""  # objects whose name ends so; "" = none

    def create_file(self, bucket_name: str, file_name: str, *args, **kwargs) -> None:
        if bucket_name == READ_ONLY or (self.refuses and file_name.endswith(self.refuses)):
            raise PermissionError(file_name)
        super().create_file(bucket_name, file_name, *args, **kwargs)
        self.written.append(file_name)


class _Router(emulator.Router):
    """One request at a time, since the emulator's storage has no locks."""

    _lock = threading.Lock()

    def handle(self, method: str) -> None:
        with self._lock:
            try:
                super().handle(method)
            except PermissionError:
                self._request_handler.send_error(HTTPStatus.FORBIDDEN)


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Gcs]:
    """One for the session: the clients keep the address that they have first seen."""
    storage = Gcs()
    for name in ("tests", READ_ONLY):
        buckets.create_bucket(name, storage)
    handler = functools.partial(emulator.RequestHandler, storage)
    with _Server(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "Router", _Router)
        patch.setattr(logging.getLogger(emulator.__name__), "disabled", True)
        storage.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield storage
        server.shutdown()


@pytest.fixture
def gcs(gcs_server, monkeypatch) -> Iterator[Gcs]:
    """A server with the buckets `tests` and `read-only`.

    Its address is in the environment, where processes that a test starts find it too.
    """
    for name in _VARIABLES:
        monkeypatch.setenv(name, gcs_server.address)
    yield gcs_server
    gcs_server.written.clear()
    gcs_server.refuses = ""


@pytest.fixture
def bucket(gcs) -> epath.Path:
    """A folder of its own, in a bucket, for every test."""
    return files.locate(f"gs://tests/{uuid.uuid4().hex[:8]}")
