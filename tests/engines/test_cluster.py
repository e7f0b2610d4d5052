"""Reaching a cluster: machines that join late are waited for, nobody at an address is told at once, leftovers go."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench.engines import cluster
from workbench.engines import ray as engine
from workbench.errors import UserError

NODE = {"Alive": True, "Resources": {"CPU": 2.0}}


def test_machines_that_join_late_are_waited_for(monkeypatch: pytest.MonkeyPatch):
    nodes, waits = [NODE], list[float]()

    def join(seconds: float) -> None:
        waits.append(seconds)
        nodes.append(NODE)

    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: float(len(waits)), sleep=join))
    found = engine._joined(SimpleNamespace(nodes=lambda: nodes), 6, 0, 1)
    assert (len(found), len(waits)) == (3, 2)
    monkeypatch.setattr(engine, "JOINED", 0.0)
    assert len(engine._joined(SimpleNamespace(nodes=lambda: nodes), 600, 0, 1)) == 3


def test_an_address_where_nobody_listens_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    never = SimpleNamespace(init=lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(UserError, match=rf"no Ray cluster answers at '{address}' .*start one with `ray start --head`"):
        cluster._join(never, address, {})


def test_a_cluster_that_listens_and_takes_nobody_in_says_what_it_may_ask_for():
    def init(**_: object) -> None:
        raise ConnectionError("Failed to connect")

    with socket.create_server(("127.0.0.1", 0)) as there:
        with pytest.raises(UserError, match=r"does not take this process in \(Failed to connect\); .*RAY_AUTH_TOKEN"):
            cluster._join(SimpleNamespace(init=init), f"127.0.0.1:{there.getsockname()[1]}", {})


def test_folders_of_processes_that_are_gone_are_removed_and_those_in_use_stay(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cluster, "LONGEST", 1000)
    mine, lock = cluster._folder()
    (tmp_path / "wb-ray-dead").mkdir()
    (tmp_path / "wb-ray-dead" / "session").write_text("")
    (tmp_path / "wb-ray-link").symlink_to(tmp_path)
    other, second = cluster._folder()
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, other.name, "wb-ray-link"}
    assert lock is not None
    assert second is not None
    os.close(lock)
    os.close(second)
    third, last = cluster._folder()
    assert {p.name for p in tmp_path.iterdir() if not Path(p).is_symlink()} == {third.name}
    assert last is not None
    os.close(last)


def test_a_sigterm_acts_as_an_interrupt(interrupts_are_heard: None):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), engine._terminated_as_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
