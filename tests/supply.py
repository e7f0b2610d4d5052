"""What the project stands on: `python -m tests.supply` says the licence of every package that is installed, and asks
whether any has a known vulnerability. It ends with 1 for one that has, and for a licence that nobody here has looked at."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SECONDS = 300.0
"""that the question for vulnerabilities may take"""
PERMISSIVE = {
    "MIT", "MIT-CMU", "0BSD", "BSD", "BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD", "Apache-2.0", "Apache", "ISC",
    "PSF-2.0", "Python Software Foundation", "CNRI-Python", "Zlib", "CC0-1.0", "BSL-1.0", "AFL-2.1", "Unlicense", "HPND",
    "Apache-2.0 WITH LLVM-exception",
}  # fmt: skip
"""licences that ask for their text and a name; in the words of the packages"""
WEAK = {
    "MPL-2.0": "changes to its own files stay under it; it is used unchanged",
    "LGPL": "it is used unchanged, as a library",
}
"""copyleft that ends at the package's own files, each with why it is no burden here"""
NAMED = {"atheris": "Apache-2.0 by its repository; its metadata say nothing. For fuzzing alone."}
"""packages whose metadata do not tell their licence, which was looked up"""
Run = Callable[[Sequence[str], float], str]


@dataclass(frozen=True)
class Audit:
    """What is known of the packages' vulnerabilities."""

    audited: int
    skipped: tuple[str, ...] = ()
    vulnerable: tuple[str, ...] = field(default=())
    """package, version, and what it has"""
    why: str = ""
    """why nothing is known, where nothing is"""

    def __str__(self) -> str:
        if not self.audited:
            return f"skipped: the vulnerability data cannot be reached ({self.why or 'no package was found there'})"
        more = f", {len(self.skipped)} not found there ({', '.join(self.skipped[:5])})" if self.skipped else ""
        bad = "".join(f"\n  {line}" for line in self.vulnerable)
        return f"{self.audited} packages audited{more}: {len(self.vulnerable)} with a known vulnerability{bad}"


def licences(run: Run | None = None) -> dict[str, str]:
    """The licence of every installed package, as `pip-licenses` finds it, one line each."""
    found = json.loads((run or _run)(["piplicenses", "--format=json", "--from=mixed", "--with-system"], SECONDS))
    return {one["Name"]: _first_line(one["License"]) for one in found}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "UNKNOWN")


def unknown_parts(licence: str) -> list[str]:
    """The parts of a licence that are not known to be permissive or weak; of alternatives, one that is known is enough.

    >>> unknown_parts("MIT AND PSF-2.0"), unknown_parts("GPL-3.0 OR MIT"), unknown_parts("GPL-3.0 AND MIT")
    ([], [], ['GPL-3.0'])
    """
    sides = [re.split(r"\bAND\b|;", side) for side in re.split(r"\bOR\b", licence)]
    found = [[name for part in side if (name := _plain(part)) and not _known(name)] for side in sides]
    return min(found, key=len)


def _plain(name: str) -> str:
    """
    >>> _plain(" The MIT License (MIT)"), _plain("Apache Software License"), _plain("Mozilla Public License 2.0 (MPL 2.0)")
    ('MIT', 'Apache', 'MPL-2.0')
    """
    name = re.sub(r"\(.*?\)|[()]", " ", name)
    name = re.sub(r"Mozilla Public License 2\.0", "MPL-2.0", name)
    name = re.sub(r"\b(The|Software|Licen[sc]e|version)\b(?! Foundation)", " ", name, flags=re.I)
    name = re.sub(r"^Apache,? v?2(\.0)?$", "Apache-2.0", " ".join(name.split()))
    return name


def _known(name: str) -> bool:
    return name in PERMISSIVE or any(name.startswith(weak) for weak in WEAK)


def unlooked(found: Mapping[str, str]) -> dict[str, str]:
    """The packages whose licence nobody here has looked at."""
    return {name: said for name, said in found.items() if name not in NAMED and unknown_parts(said)}


def audit(run: Run | None = None) -> Audit:
    """Asks pip-audit; where its data cannot be reached, in time or at all, that is what is said, and no error."""
    try:
        text = (run or _run)(["pip_audit", "--progress-spinner", "off", "--format", "json", "--timeout", "10"], SECONDS)
        listed = json.loads(text)["dependencies"]
    except subprocess.TimeoutExpired:
        return Audit(0, why=f"no answer in {SECONDS:.0f} s")
    except (OSError, ValueError, KeyError, TypeError) as err:
        return Audit(0, why=" ".join(str(err).split())[:120] or type(err).__name__)
    known: list[dict[str, Any]] = [one for one in listed if "skip_reason" not in one]
    skipped = tuple(str(one["name"]) for one in listed if "skip_reason" in one)
    bad = tuple(
        f"{one['name']} {one['version']}: {', '.join(v['id'] for v in one['vulns'])}"
        for one in known
        if one.get("vulns")
    )
    return Audit(len(known), skipped, bad)


def _run(module: Sequence[str], seconds: float) -> str:
    done = subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True, timeout=seconds)
    if (
        not done.stdout.strip()
    ):  # pip-audit ends with 1 where it found something, and says so; with nothing to say, why not
        raise OSError((done.stderr.strip().splitlines() or [f"{module[0]} ended with {done.returncode}"])[-1])
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.supply", description=__doc__)
    parser.add_argument("--licences", action="store_true", help="only the licences, for which no network is needed")
    given = parser.parse_args()
    found = licences()
    by_licence: dict[str, list[str]] = {}
    for name, said in found.items():
        by_licence.setdefault(said, []).append(name)
    for said, names in sorted(by_licence.items()):
        print(f"{said[:60]:60} {len(names):>4}  {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    odd = unlooked(found)
    for name, said in odd.items():
        print(f"not looked at: {name} is under {said[:120]!r}; add it to tests/supply.py, or do without it")
    if given.licences:
        return 1 if odd else 0
    made = audit()
    print(f"audit {made}")
    return 1 if odd or made.vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
