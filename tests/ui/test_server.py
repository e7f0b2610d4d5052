"""The server runs a script that Streamlit takes for no page of its own kind, so that a link to a page opens that page."""

from __future__ import annotations

from pathlib import Path

from ui.server import command


def test_no_folder_of_pages_lies_beside_the_script_that_is_served():
    line = command("127.0.0.1", 8501)
    script = Path(line[line.index("run") + 1])
    assert script.is_file()
    assert not (script.parent / "pages").exists()
