"""Rows that are kept on a device; the CPU stands in for a GPU, with keep=True."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from workbench import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows
from workbench.store.store import Store as StoreClass

from .made import made_store, noise

N, D = 300, 8
SITE = N * D * 4
"""bytes of one site"""
A, B, C = Site(0), Site(1), Site(2)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    values = {site: noise(N, D, site.layer) for site in (A, B, C)}
    return made_store(tmp_path_factory.mktemp("resident") / "s", values, ["one two three"] * 100, shard=128)


@pytest.fixture
def reads(monkeypatch) -> list[Site]:
    """The sites that were read whole, in order."""
    found: list[Site] = []
    read = StoreClass.read

    def counted(self, site, rows=None, **more):
        if rows is None:
            found.append(Site.parse(site))
        return read(self, site, rows, **more)

    monkeypatch.setattr(StoreClass, "read", counted)
    return found


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [None, slice(5, 290), slice(0, 9, 2), range(3, 200), [4, 299, 4], [-1]])
def test_rows_are_those_of_the_store(store, keep, rows):
    assert torch.equal(ResidentRows(store, "cpu", keep=keep).take(B, rows), store.read(B, rows))


@pytest.mark.parametrize("keep", [True, False])
def test_batches_are_all_rows_in_order(store, keep):
    batches = [batch.clone() for batch in ResidentRows(store, "cpu", keep=keep).batches(A, 70)]
    assert [len(batch) for batch in batches] == [70, 70, 70, 70, 20]
    assert torch.equal(torch.cat(batches), store.read(A))


def test_a_site_is_read_once_and_kept(store, reads):
    resident = ResidentRows(store, "cpu", keep=True)
    for _ in range(3):
        resident.take(A, [1])
        list(resident.batches(A))
    assert reads == [A]
    assert resident.sites == [A]
    assert resident.n_bytes == SITE


def test_one_site_under_any_of_its_names_is_kept_once(store, reads):
    resident = ResidentRows(store, "cpu", keep=True)
    for name in (C, "resid_post.2", 2, -1, "blocks.2.hook_resid_post"):
        resident.take(name, [0])
    assert reads == [C]
    assert resident.n_bytes == SITE


def test_the_one_asked_for_longest_ago_makes_room(store, reads):
    resident = ResidentRows(store, "cpu", keep=True, budget=2 * SITE)
    for site in (A, B, A, C):
        resident.take(site, [0])
    assert resident.sites == [A, C], "B was asked for longest ago"
    assert resident.n_bytes <= 2 * SITE
    resident.take(A, [0])
    assert reads == [A, B, C]
    resident.take(B, [0])
    assert resident.sites == [A, B]


def test_what_does_not_fit_is_read_anew_and_pushes_nothing_out(tmp_path, reads):
    wide = made_store(tmp_path / "s", {A: noise(N, D), B: noise(N, 4 * D, 1)}, ["one two three"] * 100)
    resident = ResidentRows(wide, "cpu", keep=True, budget=2 * SITE)
    resident.take(A, [0])
    assert torch.equal(resident.take(B, [7, 3]), wide.read(B, [7, 3]))
    assert torch.equal(torch.cat([b.clone() for b in resident.batches(B, 50)]), wide.read(B))
    assert resident.sites == [A]


def test_nothing_is_kept_on_a_cpu_unless_told(store, reads):
    resident = ResidentRows(store, "cpu")
    resident.take(A, [0])
    list(resident.batches(A))
    assert reads == []
    assert (resident.sites, resident.n_bytes) == ([], 0)


def test_released_rows_are_loaded_again(store, reads):
    resident = ResidentRows(store, "cpu", keep=True)
    before = resident.take(A)
    resident.release()
    assert resident.n_bytes == 0
    assert torch.equal(resident.take(A), before), "what somebody holds stays good"
    assert reads == [A, A]
    resident.close()
    assert resident.sites == []


def test_a_look_at_some_rows_loads_no_site(store, reads):
    resident = ResidentRows(store, "cpu", keep=True)
    assert torch.equal(resident.some(B, [9, 2]), store.read(B, [9, 2]))
    assert (reads, resident.sites) == ([], [])
    resident.take(B, [0])
    assert torch.equal(resident.some(-2, torch.tensor([9, 2])), store.read(B, [9, 2]))
    assert torch.equal(resident.some(B, slice(3, 5)), store.read(B, slice(3, 5)))
    assert reads == [B]


def test_many_threads_load_a_site_once(store, reads):
    resident, gate = ResidentRows(store, "cpu", keep=True, budget=2 * SITE), threading.Barrier(8)

    def look(i: int) -> bool:
        gate.wait(timeout=30)
        return torch.equal(resident.take(A, [i]), store.read(A, [i]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(8)))
    assert reads == [A]


def test_threads_that_ask_for_other_sites_and_release_get_their_own(store):
    resident = ResidentRows(store, "cpu", keep=True, budget=SITE)

    def look(i: int) -> bool:
        site = (A, B, C)[i % 3]
        if i % 7 == 0:
            resident.release()
        same = torch.equal(torch.cat(list(resident.batches(site, 64))), store.read(site))
        return same and resident.n_bytes <= SITE

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(look, range(60)))


def test_what_is_not_there_is_refused_as_by_the_store(store):
    for keep in (True, False):
        resident = ResidentRows(store, "cpu", keep=keep)
        with pytest.raises(UserError, match=r"has no mlp_out.1"):
            resident.take("mlp_out.1")
        with pytest.raises(UserError, match=f"has rows 0 to {N - 1}"):
            resident.take(A, [N])
        with pytest.raises(UserError, match="out of range"):
            list(resident.batches(3))
