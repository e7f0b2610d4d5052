"""Text of others stays text: what is shown of it, and that no page hands it to what reads Markdown or HTML."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from streamlit.testing.v1 import AppTest

from ui import text

from ..conftest import ROOT

HOSTILE = ("<script>alert(1)</script>", "[x](javascript:alert(1))", "**b** `c` :red[d] $e$", "a\u202eb", "x" * 10_000,
           "www.example.org https://example.org a@example.org", "![i](https://example.org/i.png)")  # fmt: skip
MARKDOWN = {"markdown", "write", "caption", "error", "warning", "info", "success", "title", "header", "subheader", "toast",
            "metric", "html", "latex", "badge", "write_stream", "exception", "help"}  # fmt: skip
LABELLED = {"button", "checkbox", "toggle", "radio", "pills", "tabs", "expander", "popover", "segmented_control",
            "selectbox", "multiselect", "slider", "select_slider", "text_input", "text_area", "number_input",
            "download_button", "form_submit_button", "link_button", "page_link", "status", "spinner",
            "date_input", "file_uploader", "chat_input", "chat_message", "feedback"}  # fmt: skip

OURS = {("text.py", "caption"), ("opened.py", "selectbox"), ("picks.py", "selectbox"), ("lens.py", "selectbox")}
"""a remark, which escapes; and the labels of `pick` and `choice`, which pages write"""


@pytest.mark.parametrize("given", HOSTILE)
def test_what_is_shown_is_seen_and_short(given):
    seen = text.shown(given)
    assert len(seen) <= text.LONGEST + 40
    assert "\u202e" not in seen
    assert len(given) <= text.LONGEST or "10,000 characters" in seen


@pytest.mark.parametrize("given", HOSTILE[:3])
def test_every_way_to_show_it_shows_it_as_text(given):
    def page(given):
        from ui import text

        text.write(given)
        text.problem(given, fix=given)
        text.missing(given, given)

    shown = AppTest.from_function(page, kwargs={"given": given}).run()
    assert not shown.exception
    assert [t.value for t in shown.text] == [given] * 3
    assert not [m for m in shown.markdown if given in m.value]


def test_lines_keep_their_ends_and_nothing_else_that_is_not_seen():
    assert text.lines("a\u202eb\n\tc") == "a⟨U+202E⟩b\n⟨U+0009⟩c"
    assert text.lines("x" * 10_000, 3) == "xxx… (10,000 characters)"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for file in sorted((ROOT / "ui").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield file.name, node.func.attr, node


def literal(node: ast.expr) -> bool:
    """A string that was written in this package, whole or in parts."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return literal(node.body) and literal(node.orelse)
    if isinstance(node, ast.BinOp):
        return literal(node.left) and literal(node.right)
    return False


def numbers_only(node: ast.expr) -> bool:
    """An f-string whose parts are formatted as numbers, which no text survives."""
    return isinstance(node, ast.JoinedStr) and all(
        isinstance(part, ast.Constant) or (isinstance(part, ast.FormattedValue) and _is_number(part))
        for part in node.values
    )


def _is_number(part: ast.FormattedValue) -> bool:
    spec = part.format_spec
    shape = (
        "".join(str(v.value) for v in spec.values if isinstance(v, ast.Constant))
        if isinstance(spec, ast.JoinedStr)
        else ""
    )
    of_len = isinstance(part.value, ast.Call) and isinstance(part.value.func, ast.Name) and part.value.func.id == "len"
    return of_len or shape[-1:] in tuple("dfeg%,")


def test_no_page_hands_text_of_others_to_what_reads_markdown():
    streamlit = MARKDOWN | LABELLED
    found = [
        f"{file}:{node.lineno} {name}"
        for file, name, node in calls()
        if name in streamlit and node.args and _is_streamlit(node) and not (literal(node.args[0]) or numbers_only(node.args[0]))
        and (file, name) not in OURS
    ]  # fmt: skip
    assert found == []


def _is_streamlit(node: ast.Call) -> bool:
    """Calls on `st` and on its containers; `text.write(...)` is ours."""
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    return not (isinstance(owner, ast.Name) and owner.id in ("text", "os", "handle", "file", "re"))


def test_no_page_asks_for_html():
    assert [f"{f}:{n.lineno}" for f, _, n in calls() if any(k.arg == "unsafe_allow_html" for k in n.keywords)] == []
    assert [f"{f}:{n.lineno}" for f, name, n in calls() if name in ("html", "switch_page") and _is_streamlit(n)] == []
