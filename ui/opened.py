"""The opened folder: what it holds, and the picks of a page in it, which its address carries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import streamlit as st

from workbench.catalogue import Catalogue, Entry, catalogue
from workbench.errors import UserError
from workbench.store import Store

from . import text
from .held import open_store
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
    names = [entry.name for entry in entries]
    asked = st.query_params.get(key)
    if asked is not None and asked not in {text.shown(name, 120) for name in names}:  # an address holds what is shown
        text.problem(f"the link asks for {key} {asked!r}, which is not in the opened folder; it was refused")
    if not names:
        return None
    name = st.selectbox(label, names, key=key, bind="query-params", format_func=lambda n: text.shown(n, 120))
    return next(entry for entry in entries if entry.name == name)


def choose(
    label: str,
    names: Sequence[str],
    key: str,
    *,
    default: str = "",
    index: int = 0,
    known: Collection[str] = (),
    shown: Mapping[str, str] | None = None,
    help: str | None = None,
) -> str:
    """A choice among names, in the page's address as `key`; at least one name is given.

    A name in the address that is not one of them is refused in so many words, unless it is one of `known`: those that
    other picks of the page leave no room for, which give way to `default`, or to the name at `index`. shown: how names of
    our own are told; others are shown as text.
    """
    words = {name: (shown or {}).get(name) or text.shown(name, 120) for name in (*names, *known)}
    asked = st.query_params.get(key)
    if asked is not None and asked not in words.values():
        text.problem(f"the link asks for {key} {asked!r:.200}, which is not there; it was refused")
    return st.selectbox(label, names, index=names.index(default) if default in names else index, key=key,
                        bind="query-params", format_func=lambda name: words[name], help=help)  # fmt: skip


def choose_site(store: Store, key: str = "site", *, label: str = "Site") -> str:
    """A site of a store, the last unless another is asked for."""
    names = [str(site) for site in store.sites]
    return choose(label, names, key, index=len(names) - 1)


def stamp(store: Store) -> int:
    """When the store at this path was last written: what is kept of it is kept by this."""
    try:
        return (store.path / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0


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
