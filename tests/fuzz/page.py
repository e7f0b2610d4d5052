"""`python -m tests.fuzz.page < OUTPUT`: puts what a run of `python -m tests.fuzz` printed into docs/trust.md."""

from __future__ import annotations

import platform
import re
import sys
import time

from .runner import HERE

PAGE = HERE.parents[1] / "docs" / "trust.md"
BEGIN, END = "<!-- fuzz: written by python -m tests.fuzz.page -->", "<!-- /fuzz -->"
LINE = re.compile(r"^(\S+) +([\d,]+) inputs +([\d,]+)/s +(\d+) findings$", re.M)


def table(printed: str, date: str, python: str) -> str:
    """The Markdown of a run.

    >>> print(table("map   1,000 inputs   500/s   0 findings", "2026-01-02", "3.11"))
    Of 2026-01-02, Python 3.11, two processes on a shared machine of two cores:
    <BLANKLINE>
    | target | inputs | a second | findings |
    |---|---|---|---|
    | map | 1,000 | 500 | 0 |
    """
    rows = [f"| {name} | {inputs} | {rate} | {found} |" for name, inputs, rate, found in LINE.findall(printed)]
    about = f"Of {date}, Python {python}, two processes on a shared machine of two cores:"
    return "\n".join([about, "", "| target | inputs | a second | findings |", "|---|---|---|---|", *rows])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    made = table(sys.stdin.read(), time.strftime("%Y-%m-%d"), platform.python_version())
    PAGE.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
