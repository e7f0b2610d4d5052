"""`workbench ui`: what it refuses before a server is up, and what it hands to it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ui.server import command
from ui.settings import VARIABLE, Settings, settings
from workbench.cli import app
from workbench.errors import UserError


def run(*arguments: object):
    return CliRunner().invoke(app, ["ui", *map(str, arguments)])


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_address_needs_a_token(tmp_path, address):
    done = run(tmp_path, "--address", address)
    assert done.exit_code == 2
    assert "give --token too, which is asked for at the door" in done.stderr


def test_a_folder_that_is_not_there_is_a_line(tmp_path):
    done = run(tmp_path / "none")
    assert done.exit_code == 2
    assert "no such folder; give the one that holds your runs and stores" in done.stderr


def test_a_port_that_is_taken_is_a_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(tmp_path, "--port", taken.getsockname()[1])
    assert done.exit_code == 2
    assert "give another --port" in done.stderr


def test_the_server_is_told_what_may_be_opened_and_nothing_of_it_is_on_its_command_line(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "subprocess.run", lambda line, env, check: seen.update(line=line, env=env) or SimpleNamespace(returncode=0)
    )
    done = run(tmp_path, "--token", "--model", "a/b", "--model", "c", "--device", "cpu", "--port", "18765")
    assert done.exit_code == 0
    told = settings(seen["env"])
    assert (told.folder, told.models, told.device) == (tmp_path.resolve(), ("a/b", "c"), "cpu")
    assert len(told.token) >= 32
    assert f"token: {told.token}" in done.stdout
    assert not [part for part in seen["line"] if told.token in part or str(tmp_path) in part]
    assert "--server.address=127.0.0.1" in seen["line"]
    assert set(seen["env"]) >= set(os.environ)


def test_the_server_shows_no_details_of_errors_and_sends_no_statistics():
    line = " ".join(command("127.0.0.1", 1))
    assert "--browser.gatherUsageStats=false" in line
    assert "--client.showErrorDetails=type" in line
    assert "enableXsrfProtection" not in line
    assert "enableCORS" not in line


def test_settings_are_read_back_and_missing_ones_told(tmp_path):
    made = Settings(Path(tmp_path).resolve(), ("m",), "t", "cpu")
    assert settings(made.variable()) == made
    assert json.loads(made.variable()[VARIABLE])["folder"] == str(tmp_path.resolve())
    with pytest.raises(UserError, match="started with `workbench ui"):
        settings({})
