"""The licences of what is installed are known, and an audit that could not be made is not taken for a good one."""

from __future__ import annotations

import json
import subprocess

import pytest

from . import supply


def test_every_installed_package_has_a_licence_that_was_looked_at():
    found = supply.licences()
    assert {"torch", "transformers", "safetensors"} <= set(found)
    assert supply.unlooked(found) == {}


@pytest.mark.parametrize(
    ("licence", "unknown"),
    [
        ("MIT", []), ("The MIT License (MIT)", []), ("Apache Software License; MIT License", []), ("Apache 2.0 License", []),
        ("3-Clause BSD License", []), ("ISC License (ISCL)", []), ("Mozilla Public License 2.0 (MPL 2.0)", []),
        ("MIT OR GPL-3.0", []), ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSL-1.0", []),
        ("GPL-3.0", ["GPL-3.0"]), ("MIT AND AGPL-3.0", ["AGPL-3.0"]), ("UNKNOWN", ["UNKNOWN"]),
        ("Proprietary", ["Proprietary"]),
        ("GNU General Public License v3 (GPLv3)", ["GNU General Public v3"]),
    ],
)  # fmt: skip
def test_what_is_not_permissive_is_named(licence, unknown):
    assert supply.unknown_parts(licence) == unknown
    assert bool(supply.unlooked({"x": licence})) == bool(unknown)


def answer(*packages):
    return lambda module, seconds: json.dumps({"dependencies": list(packages)})


def test_a_known_vulnerability_is_told():
    bad = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}
    made = supply.audit(
        answer(bad, {"name": "b", "version": "2", "vulns": []}, {"name": "c", "skip_reason": "not on PyPI"})
    )
    assert (made.audited, made.skipped, made.vulnerable) == (2, ("c",), ("a 1: CVE-1, CVE-2",))
    assert str(made).startswith("2 packages audited, 1 not found there (c): 1 with a known vulnerability")


def failing(err):
    def run(module, seconds):
        raise err

    return run


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (answer({"name": "a", "skip_reason": "Dependency not found on PyPI"}), "no package was found there"),
        (failing(OSError("no route to host")), "no route to host"),
        (failing(subprocess.TimeoutExpired("pip_audit", 1)), "no answer in 300 s"),
        (lambda module, seconds: "<html>", "Expecting value"),
    ],
)
def test_an_audit_that_reached_nothing_says_so_and_is_no_error(run, words):
    made = supply.audit(run)
    assert (made.audited, made.vulnerable) == (0, ())
    assert str(made).startswith("skipped: the vulnerability data cannot be reached")
    assert words in str(made)


@pytest.mark.parametrize(("vulnerable", "code"), [((), 0), (("a 1: CVE-1",), 1)])
def test_the_command_fails_for_a_vulnerability_and_not_for_want_of_network(vulnerable, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["supply"])
    monkeypatch.setattr(supply, "licences", lambda: {"a": "MIT"})
    for made in (supply.Audit(3 if vulnerable else 0, (), vulnerable),):
        monkeypatch.setattr(supply, "audit", lambda made=made: made)
        assert supply.main() == code
    assert "audit " in capsys.readouterr().out
