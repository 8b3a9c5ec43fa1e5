"""Who waits for whom, and what is said when somebody stays away; processes are threads here."""

import concurrent.futures
import socket

import pytest

from deevisum_jax import rendezvous
from deevisum_jax.errors import UserError
from tests.processes import free_port


def meet_all(whos, timeout_s=20.0, host="localhost") -> list[str]:
    """What every one of (number, index) is told; "" = to go on."""
    address = f"{host}:{free_port()}"

    def meet(who):
        try:
            rendezvous.meet(address, *who, timeout_s)
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(whos)) as pool:
        return list(pool.map(meet, whos))


def connect(address: str, first: concurrent.futures.Future) -> socket.socket:
    """To process 0, as soon as it listens."""
    while True:
        try:
            return socket.create_connection(rendezvous.split_address(address))
        except ConnectionRefusedError:
            assert not first.done()


def test_all_go_on_when_all_are_there():
    assert meet_all([(4, 0), (4, 2), (4, 1), (4, 3)]) == [""] * 4


def test_who_stays_away_is_named_to_all():
    told = meet_all([(4, 0), (4, 2)], timeout_s=2.0)
    assert told[0].startswith("processes 1, 3 of 4 did not come to localhost:")
    assert "within 2 s; start all of them" in told[0]
    assert told[1] == told[0]


def test_nobody_at_the_address():
    [told] = meet_all([(2, 1)], timeout_s=1.0)
    assert told.startswith("process 1 of 2 could not reach process 0 at localhost:")
    assert "within 1 s (Connection refused); start process 0" in told


def test_two_with_one_number_are_told_so():
    told = meet_all([(3, 0), (3, 1), (3, 1)])
    assert told == ["two processes say that they are process 1; give each its own number"] * 3


def test_one_that_was_killed_while_it_waited_may_come_again():
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(rendezvous.meet, address, 3, 0, 20.0)
        killed = connect(address, first)
        killed.sendall(b"deevisum_jax process 1 of 3\n")
        killed.close()
        others = [pool.submit(rendezvous.meet, address, 3, index, 20.0) for index in (1, 2)]
        for waits in (first, *others):
            waits.result()


def test_one_that_was_killed_while_it_waited_is_missing():
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.meet, address, 3, 0, 2.0)
        killed = connect(address, first)
        killed.sendall(b"deevisum_jax process 1 of 3\n")
        killed.close()
        other = pool.submit(rendezvous.meet, address, 3, 2, 10.0)
        for waits in (first, other):
            with pytest.raises(UserError, match="process 1 of 3 did not come to localhost"):
                waits.result()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["[::1]", "127.0.0.1"])
def test_both_kinds_of_addresses_are_reached(host):
    assert meet_all([(2, 0), (2, 1)], host=host) == ["", ""]


def test_different_numbers_of_processes():
    told, other = meet_all([(2, 0), (3, 2)])
    assert told.startswith("process 0 was started as one of 2, process 2 as one of 3; start all")
    assert other == told


def test_a_port_that_is_taken(monkeypatch):
    monkeypatch.setattr(rendezvous, "_PORT_FREE_S", 0.0)
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of this machine cannot be had \(Add"):
            rendezvous.meet(f"localhost:{port}", 2, 0, 5.0)


def test_a_port_that_is_given_free_in_time():
    other = socket.create_server(("", 0))
    address = f"localhost:{other.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.meet, address, 2, 0, 20.0)
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(timeout=0.2)
        other.close()
        pool.submit(rendezvous.meet, address, 2, 1, 20.0).result()
        first.result()


def test_somebody_who_looks_which_ports_are_open_is_no_process(monkeypatch):
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.5)
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.meet, address, 2, 0, 20.0)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b""):
            stranger = connect(address, first)
            stranger.sendall(said)
            stranger.close()
        pool.submit(rendezvous.meet, address, 2, 1, 20.0).result()
        first.result()


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("10.0.0.2:8476", ("10.0.0.2", 8476)),
        ("worker-0.pod:1", ("worker-0.pod", 1)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
    ],
)
def test_addresses(address, split):
    assert rendezvous.split_address(address) == split


@pytest.mark.parametrize(
    "address", ["10.0.0.2", "10.0.0.2:", ":8476", "host:0", "host:65536", "http://host:80", "a b:1"]
)
def test_what_is_no_address(address):
    with pytest.raises(UserError, match=r"is no HOST:PORT; give the address of process 0"):
        rendezvous.split_address(address)
