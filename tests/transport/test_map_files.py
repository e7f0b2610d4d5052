"""Maps on disk are the maps that were fitted; memory holds one of them; what does not fit is told before the work."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site
from workbench.transport import TransportGrid, transport_grid
from workbench.transport.map_files import MapFolder, maps_bytes
from workbench.transport.rows import StoreRows

from .streams import stream, write_stream

QUICK = {"folds": 2, "shards": 4, "alpha": 0.1, "baselines": ()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("planted") / "s", stream(1000), 20)


def test_streamed_maps_are_those_that_memory_would_hold(planted, tmp_path):
    held = transport_grid(planted, keep_maps=True, **QUICK)
    streamed = transport_grid(planted, keep_maps=True, maps=tmp_path / "maps", **QUICK)
    assert held.frame().equals(streamed.frame())
    streamed.save(tmp_path / "g")
    shutil.rmtree(tmp_path / "maps")
    again = TransportGrid.load(tmp_path / "g")
    for name in ("operators", "controls"):
        maps = getattr(again, name)
        assert isinstance(maps, MapFolder)
        assert list(maps) == held.pairs
        assert maps == getattr(held, name)
        assert maps[held.pairs[0]].meta == getattr(held, name)[held.pairs[0]].meta
    widths = dict.fromkeys((Site(0), Site(1), Site(2)), 8)
    size = sum(f.stat().st_size for f in (tmp_path / "g" / "operators").iterdir())
    assert maps_bytes(held.pairs, widths) <= size < maps_bytes(held.pairs, widths) + 600 * len(held.pairs)
    again.save(tmp_path / "h")
    assert TransportGrid.load(tmp_path / "h").operators == held.operators


def test_a_map_is_read_when_it_is_asked_for(planted, tmp_path):
    grid = transport_grid(planted, keep_maps=True, maps=tmp_path, **QUICK)
    pair, other = grid.pairs[:2]
    MapFolder(tmp_path / "ridge").keep(pair, LinearMap.identity(8))
    assert grid.operators[pair] == LinearMap.identity(8)
    grid.operators.file(other).unlink()
    assert other not in grid.operators
    assert grid.operators.get(other) is None
    assert len(grid.operators) == 2
    grid.operators.file(pair).write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        grid.operators[pair]


def test_some_maps_are_kept(planted, tmp_path):
    some = [(Site(0), Site(2))]
    for maps in (None, tmp_path):
        grid = transport_grid(planted, keep_maps=some, keep_controls=False, maps=maps, **QUICK)
        assert list(grid.operators) == some
        assert not grid.controls
    with pytest.raises(UserError, match=r"the map of resid_post\.0 to resid_post\.7 cannot be kept"):
        transport_grid(planted, keep_maps=[(Site(0), Site(7))], **QUICK)


def test_maps_that_do_not_fit_are_told_before_a_row_is_read(planted, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20, 0, 500))
    monkeypatch.setattr(StoreRows, "read", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(UserError, match=r"the maps to keep take 0\.0 MiB and .* has 0\.0 MiB free; make room"):
        transport_grid(planted, keep_maps=True, maps=tmp_path / "maps", **QUICK)
    assert not (tmp_path / "maps").exists()


def test_a_disk_without_links_gets_copies(planted, tmp_path, monkeypatch):
    grid = transport_grid(planted, keep_maps=True, maps=tmp_path / "maps", **QUICK)

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    grid.save(tmp_path / "g")
    assert TransportGrid.load(tmp_path / "g").operators == grid.operators
    assert torch.equal(
        grid.operators[grid.pairs[0]].weight, TransportGrid.load(tmp_path / "g").operators[grid.pairs[0]].weight
    )
