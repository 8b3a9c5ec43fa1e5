"""What a signal does to a process that listens, alone and with others."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from deevisum_jax.errors import PreemptedError
from deevisum_jax.preemption import Notice

REPO = pathlib.Path(__file__).parent.parent
HANDLED = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def as_before():
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    assert signal.set_wakeup_fd(-1) == -1
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_handlers_come_back():
    before = [signal.getsignal(number) for number in HANDLED]
    with Notice():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before


def tell(number: int = signal.SIGTERM) -> None:
    signal.raise_signal(number)


def test_a_notice_ends_what_needs_no_saving_at_once():
    with Notice(), pytest.raises(PreemptedError, match="there was nothing to save"):
        tell()


def test_a_notice_is_only_noted_where_it_is_deferred(capfd):
    with Notice() as notice, notice.deferred():
        assert not notice.reached()
        tell()
        assert notice.reached()
        assert notice.reached()
    assert capfd.readouterr().err == "\nSIGTERM: stopping; a second one stops at once\n"


def test_a_notice_that_nobody_asked_for_is_not_forgotten():
    with Notice() as notice:
        with notice.deferred():
            tell()
        with notice.deferred():
            assert notice.reached()


def test_a_general_except_does_not_catch_a_notice():
    assert not issubclass(PreemptedError, Exception)


def test_ctrl_c_is_at_once_also_where_a_notice_is_deferred():
    with Notice() as notice, notice.deferred(), pytest.raises(KeyboardInterrupt):
        tell(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    def callback(*_):
        gc.callbacks.remove(callback)
        tell(signal.SIGINT)

    with Notice() as notice, notice.deferred():
        gc.callbacks.append(callback)
        gc.collect()  # Python drops what is raised there
        with pytest.raises(KeyboardInterrupt):
            notice.reached()


def test_the_same_signal_passed_on_twice_counts_once():
    with Notice() as notice, notice.deferred():
        tell()
        tell()
        assert notice.reached()


def test_a_notice_passed_on_late_does_not_replace_what_the_first_one_said():
    with Notice() as notice:
        with notice.deferred():
            tell()
        tell()
        assert notice.reached()


def test_who_was_told_says_goodbye_whatever_else_comes():
    with pytest.raises(PreemptedError), Notice():
        tell()
    tell()


def test_one_of_many_processes_says_goodbye_whatever_comes(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with Notice():
        pass
    tell()


HANGS = """
import ctypes
from deevisum_jax import preemption
preemption._REPEATED_S = 0.2
with preemption.Notice() as notice, notice.deferred():
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)  # for ever; as in a wait for a device, no Python runs
"""


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
    ],
)
def test_a_second_signal_ends_a_process_that_hangs(first, second, status):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(first)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=60) == status
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
