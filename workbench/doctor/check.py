"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` says what to do where the status is not OK."""

    status: Status
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14}  {self.found}" + (f"; {self.fix}" if self.fix else "")


def failed(name: str, err: Exception, fix: str) -> Check:
    """An error as a check: what it says to do, after its last semicolon, is the fix; `fix` where it says nothing."""
    found, _, said = str(err).rpartition("; ")
    return Check("FAIL", name, found, said) if found else Check("FAIL", name, said, fix)
