"""Who may look: anybody on this machine's loopback address; elsewhere whoever has the token, or whom the sign-in lets in."""

from __future__ import annotations

import secrets
import time

import streamlit as st

from .settings import settings

WRONG = 1.0
"""seconds that a wrong token costs"""


def enter() -> None:
    """Returns for those who may; for others it asks, and the script ends here."""
    if _sign_in() and not st.user.is_logged_in:
        st.title("Workbench")
        st.button("Sign in", on_click=st.login)
        st.stop()
    token = settings().token
    if not token or st.session_state.get("_entered") == token:
        return
    st.title("Workbench")
    with st.form("door"):
        given = st.text_input("Token", type="password", help="It was printed where the explorer was started.")
        sent = st.form_submit_button("Open")
    if sent and secrets.compare_digest(given.encode(), token.encode()):
        st.session_state["_entered"] = token
        st.rerun()
    if sent:
        time.sleep(WRONG)
        st.error("This is not the token.")
    st.stop()


def _sign_in() -> bool:
    """Whether Streamlit's own sign-in is configured."""
    try:
        return "auth" in st.secrets
    except FileNotFoundError:  # there are no secrets
        return False
