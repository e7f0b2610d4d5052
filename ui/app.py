"""The explorer's frame: the door, the pages, and what is held in memory. Started by `workbench ui`."""

from __future__ import annotations

import streamlit as st

from ui import door, held, text
from ui.opened import contents
from ui.pages.activations import page as activations
from ui.pages.converters import page as converters
from ui.pages.lens import page as lens
from ui.pages.paste import page as paste
from ui.pages.probes import page as probes
from ui.pages.runs import page as runs
from ui.pages.transport import page as transport
from ui.settings import settings

PAGES = (
    (runs, "Runs", ":material/list_alt:"),
    (activations, "Activations", ":material/scatter_plot:"),
    (transport, "Transport", ":material/grid_on:"),
    (converters, "Converters", ":material/swap_horiz:"),
    (paste, "Paste", ":material/content_paste:"),
    (probes, "Probes", ":material/search_insights:"),
    (lens, "Lens", ":material/visibility:"),
)


def sidebar() -> None:
    """Which folder is open, and the memory in use."""
    found = contents()
    with st.sidebar:
        st.caption("Opened folder")
        text.write(found.folder, 200)
        if found.cut:
            st.warning("This folder holds more folders than are looked at; open one further in.")
        _memory()


@st.fragment(run_every=5)
def _memory() -> None:
    used = held.memory()
    st.caption("Memory of the explorer")
    st.text("not told by this system" if used["process"] is None else f"{used['process'] / 2**20:,.0f} MiB")
    if "device" in used:
        st.text(f"{text.shown(used['device'], 40)}: {used['used'] / 2**30:.1f} of {used['whole'] / 2**30:.1f} GiB")
    else:
        st.text("activations: memory-mapped, no GPU")
    if st.button(
        "Release", help="Lets go of open stores, activations on the device, models, and the results that were kept."
    ):
        held.release()


def main() -> None:
    st.set_page_config("Workbench", page_icon=":material/swap_calls:", layout="wide")
    door.enter()
    settings()
    held.keep_tidy()
    pages = [
        st.Page(text.told(module.page), title=title, icon=icon, default=module is runs,
                url_path="home" if module is runs else title.lower())
        for module, title, icon in PAGES
    ]  # fmt: skip
    # the first page has no path of its own; a link to /runs leads to it all the same
    pages.append(st.Page(text.told(runs.page), title="Runs", url_path="runs", visibility="hidden"))
    chosen = st.navigation(pages)
    sidebar()
    chosen.run()
