"""The opened folder: what it holds, and the picks of a page in it, which its address carries."""

from __future__ import annotations

import streamlit as st

from workbench.catalogue import Catalogue, Entry, catalogue
from workbench.errors import UserError
from workbench.store import Store

from . import text
from .held import open_store
from .picks import choice
from .settings import settings

PROFILE = "workbench profile bundled:recipient --prompts bundled:profile --out {folder}/store"


def contents() -> Catalogue:
    """What the opened folder holds; looked at again after a few seconds."""
    return _contents(str(settings().folder))


def look_again() -> None:
    """Makes `contents` look at the folder anew: something was written there."""
    _contents.clear()


@st.cache_data(ttl=5, max_entries=2, show_spinner=False)
def _contents(folder: str) -> Catalogue:
    return catalogue(folder)


def pick(label: str, entries: list[Entry], key: str) -> Entry | None:
    """A choice among entries of the folder, by name, in the page's address as `key`; None where there are none.

    A name in the address that is not one of them (a path that leads out, say) is refused in so many words.
    """
    named = {entry.name: entry for entry in entries}
    if not named:
        if (asked := st.query_params.get(key)) is not None:
            text.problem(f"the link asks for {key} {asked[:200]!r}, which is not there; it was refused")
        return None
    return named[choice(label, named.keys(), key)]


def pick_site(store: Store, key: str = "site", *, label: str = "Site") -> str:
    """A site of a store, the last unless another is asked for."""
    names = [str(site) for site in store.sites]
    return str(choice(label, names, key, names[-1]))


def pick_store(key: str = "store") -> Store | None:
    """A store of the opened folder; None, and a word on what to run, where there is none or it does not open."""
    entry = pick("Store", contents().of("store"), key)
    if entry is None:
        text.missing("No store of activations in the opened folder.", PROFILE.format(folder=settings().folder))
        return None
    try:
        return open_store(entry.path)
    except UserError as err:
        text.problem(err, fix=f"workbench stores verify {entry.path}")
        return None


def pick_run(kind: str, command: str, what: str, key: str = "run") -> Entry | None:
    """A finished run of a kind; None, and what to run, where there is none."""
    entry = pick("Run", [e for e in contents().of(kind) if e.state in ("done", "running")], key)
    if entry is None:
        text.missing(what, command)
    return entry
