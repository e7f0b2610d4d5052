"""What a probe says of every token of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.models import Model
from workbench.profile import profile_model
from workbench.prompts import PromptSet

from .probe import Probe
from .probe_transfer import check_base

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 20_000
"""characters of a text that is scored"""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """A probe's score at each token: the log-odds of `target` in nats, or the quantity."""

    probe: Probe
    target: str
    """the class; "" for a quantity"""
    tokens: tuple[str, ...]
    scores: Float[Tensor, " n"]
    positions: tuple[int, ...]

    def __repr__(self) -> str:
        return f"TokenScores({self.target or self.probe.label!r}, {len(self.tokens)} tokens, at {self.probe.site})"

    @property
    def name(self) -> str:
        """What the scores are of."""
        return f"{self.probe.label}: {self.target}" if self.target else self.probe.label

    def frame(self) -> pd.DataFrame:
        """One line for each token."""
        import pandas as pd

        table = {"position": list(self.positions), "token": list(self.tokens), "score": self.scores.tolist()}
        if self.target:
            table["probability"] = self.scores.sigmoid().tolist()
        return pd.DataFrame(table)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>" + self.frame().to_html(index=False, escape=True)


def score_text(
    model: Model,
    probe: Probe,
    text: str,
    *,
    target: str | None = None,
    chat: bool = False,
    allow_mismatch: bool = False,
) -> TokenScores:
    """A probe's score at every token of a text, special tokens too.

    target: the class whose log-odds are wanted; None: the last. chat: the text is a user's turn, put through the template.
    Raises UserError for an empty text, one of more than 20,000 characters, and a probe of another model.

    >>> score_text(model, probe, "how do i break the lock ?", chat=True).frame()          # doctest: +SKIP
    """
    if len(text) > LONGEST:
        raise UserError(
            f"a text of {len(text):,} characters is too long to be scored token by token; give at most {LONGEST:,}"
        )
    check_base(probe, model.fingerprint, model.name, allow_mismatch)
    number = probe.target_number(target)
    prompts = PromptSet.load([text], chat=chat)
    with profile_model(model, prompts, sites=[probe.site], tokens="all+special") as store:
        table, rows = store.rows(["position", "text"]), store.read(probe.site).clone()
    said = probe.classes[number] if probe.classes else ""
    scores = probe.log_odds(rows, target)
    return TokenScores(probe, said, tuple(map(str, table["text"])), scores, tuple(map(int, table["position"])))
