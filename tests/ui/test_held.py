"""What the process holds is let go of when it is asked to, and is known anew when an artefact was replaced."""

from __future__ import annotations

import os
import threading

import pytest

from ui import held
from ui.held import HeldModel, open_store
from ui.stamps import adapter_stamp, stamp, store_stamp
from workbench.errors import UserError
from workbench.store.resident import ResidentRows

from ..conftest import make_model
from .word_stores import word_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("work")
    word_store(made / "a")
    return made


def kept() -> int:
    """Bytes of results and figures that Streamlit keeps, and of nothing else."""
    from streamlit.runtime.caching import get_data_cache_stats_provider, get_resource_cache_stats_provider

    providers = (get_data_cache_stats_provider(), get_resource_cache_stats_provider())
    return sum(one.byte_length for each in providers for stats in each.get_stats().values() for one in stats)


def test_release_lets_go_of_stores_results_and_figures(open_page, folder, monkeypatch):
    page = open_page("activations", folder, view="projection")
    assert not page.exception
    rows, closed = held.rows_of(folder / "a"), list[ResidentRows]()
    monkeypatch.setattr(ResidentRows, "close", lambda self: closed.append(self))
    assert kept() > 0
    held.release()
    assert kept() == 0
    assert any(one is rows for one in closed)
    assert not page.run().exception, "the page reads anew what it shows"
    assert held.rows_of(folder / "a") is not rows


def test_garbage_is_given_back_by_one_thread_alone(monkeypatch):
    given = threading.Event()
    monkeypatch.setattr(held, "EVERY", 0.01)
    monkeypatch.setattr(held, "TIDY", "gives memory back in a test")
    monkeypatch.setattr(held, "give_back", given.set)
    held.keep_tidy()
    held.keep_tidy()
    assert sum(thread.name == held.TIDY for thread in threading.enumerate()) == 1
    assert given.wait(10)
    monkeypatch.setattr(held, "EVERY", 1e6)


def test_a_stamp_changes_with_any_of_its_files(tmp_path):
    files = [tmp_path / name for name in ("adapter.json", "adapter.safetensors")]
    assert stamp(*files) == (0, 0) == adapter_stamp(tmp_path)
    for i, file in enumerate(files):
        before = stamp(*files)
        file.write_text("x")
        os.utime(file, ns=(1, 10 + i))
        assert stamp(*files) != before
    assert adapter_stamp(tmp_path) == (10, 11)


def test_the_stamp_of_a_store_is_that_of_its_folder(open_page, folder):
    open_page("activations", folder)
    assert store_stamp(open_store(folder / "a")) == store_stamp(folder / "a") != (0,)


def test_the_fingerprint_of_a_model_needs_no_turn_once_it_is_known():
    model = HeldModel(make_model("llama"))
    known = model.fingerprint
    with model.alone():
        assert model.fingerprint == known
    model.model = None
    assert model.fingerprint == known
    released = HeldModel(make_model("llama"))
    released.model = None
    with pytest.raises(UserError, match="released meanwhile"):
        _ = released.fingerprint
