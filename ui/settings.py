"""What the explorer was started with: in one environment variable, so that no list of processes shows it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError

VARIABLE = "WORKBENCH_UI"


@dataclass(frozen=True)
class Settings:
    """The opened folder, the models that may be loaded (hub ids, folders), and the token that is asked for at the door."""

    folder: Path
    models: tuple[str, ...] = ()
    token: str = ""
    """empty: nobody is asked"""
    device: str = ""
    """of the models and of the activations that are looked at; empty: a GPU where there is one"""

    def variable(self) -> dict[str, str]:
        """The environment variable that `settings` reads."""
        values: dict[str, Any] = asdict(self) | {"folder": str(self.folder)}
        return {VARIABLE: json.dumps(values)}


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Of this process; UserError where it was not started by `workbench ui`."""
    text = environment.get(VARIABLE)
    if not text:
        raise UserError("the explorer is started with `workbench ui [FOLDER]`, which says what it may open")
    values = json.loads(text)
    return Settings(Path(values["folder"]).resolve(), tuple(values["models"]), values["token"], values["device"])
