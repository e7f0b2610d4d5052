"""A pick among values: what a link asks for, what other picks leave no room for, and names that look alike."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest

from ui.picks import unlike

from .conftest import words

SCRIPT = """
import streamlit as st
from ui.picks import choice, take
options = {"few": ["a", "b"], "many": ["a", "b", "c"]}[choice("How many", ["many", "few"], "how")]
st.text("picked " + choice("One", options, "one", "b"))
st.button("Take a", on_click=take, args=("one", "a"))
"""


def shown(**query: str) -> AppTest:
    test = AppTest.from_string(SCRIPT, default_timeout=30)
    for key, value in query.items():
        test.query_params[key] = value
    return test.run()


def test_a_pick_is_the_default_or_what_the_link_asks_for():
    assert "picked b" in words(shown())
    assert "picked c" in words(shown(one="c"))


def test_what_a_link_asks_for_and_is_not_there_is_refused_until_something_else_is_picked():
    test = shown(one="<b>z</b>")
    line = "the link asks for one '<b>z</b>', which is not there; it was refused"
    assert line in words(test)
    assert line in words(test.run()), "a page may run again by itself"
    assert not [one for one in test.markdown if "<b>" in one.value]
    assert line not in words(test.selectbox(key="one").set_value("c").run())
    test = shown(one="z")
    assert "was refused" not in words(test.button[0].click().run())
    assert "picked a" in words(test)


def test_what_another_pick_leaves_no_room_for_gives_way_to_the_default():
    test = shown(one="c")
    test.selectbox(key="how").set_value("few").run()
    assert "picked b" in words(test)
    assert "refused" not in words(test)
    test.selectbox(key="one").set_value("a").run()
    test.selectbox(key="how").set_value("many").run()
    assert "picked a" in words(test), "what is still there stays"


def test_names_that_would_look_the_same_are_told_apart():
    cut = {i: "x" * 200 + str(i) for i in range(2)}
    assert unlike(cut)[0] != unlike(cut)[1]
    assert unlike({"a": "a\u202eb", "b": "a\u27e8U+202E\u27e9b"})["b"].endswith(" (2)")
