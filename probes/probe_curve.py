"""What `train_probes` found: a probe for every site and choice of positions, its figures beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError
from workbench.evaluate.statistics import Interval
from workbench.sites import Site

from .held_out_scores import HeldOut
from .probe import Probe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ProbeLine:
    """One probe, on prompts that it has not seen, and the same with labels that the rows cannot know of."""

    positions: str
    probe: Probe
    score: HeldOut
    control: HeldOut | None
    """of the control task: labels drawn at random for each token type (where a label is the prompt's: for each prompt)"""
    shuffled: HeldOut | None
    """learned from labels that were shuffled among the training rows (prompts), tested on the true ones"""
    selectivity: Interval | None
    """accuracy (R2) less that of the control task, on the same rows"""
    n_train: int
    converged: bool

    @property
    def site(self) -> Site:
        return self.probe.site

    def as_dict(self) -> dict[str, Any]:
        """One line of a table."""
        line: dict[str, Any] = {"site": str(self.site), "positions": self.positions, **self.score.line()}
        for name, found in (("control", self.control), ("shuffled", self.shuffled)):
            if found is not None:
                head = found.headline
                line |= {name: head.value, f"{name}_low": head.low, f"{name}_high": head.high}
        if self.selectivity is not None:
            line |= {"selectivity": self.selectivity.value, "selectivity_low": self.selectivity.low,
                     "selectivity_high": self.selectivity.high}  # fmt: skip
        return line | {"chance": self.score.chance, "n_train": self.n_train, "n_held_out": self.score.n,
                       "prompts_held_out": self.score.n_groups, "converged": self.converged}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ProbeCurve:
    """Probes of one label over sites and positions; see `probes.linear.train_probes`."""

    label: str
    kind: str
    classes: tuple[str, ...]
    """() for a quantity"""
    lines: tuple[ProbeLine, ...]
    words: Mapping[str, HeldOut]
    """by positions: the same task from the token ids alone (of a prompt's label: from the words of the prompt)"""
    control_of: str
    """token or prompt: what the control task's labels hang on"""
    notes: tuple[str, ...] = ()
    """rows that were left out or drawn, and what else limits the figures"""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        best = self.best
        return (f"ProbeCurve({self.kind} of {self.label!r}, {len(self.lines)} probes, best {self.score_name} "
                f"{best.score.headline} at {best.site}, positions {best.positions})")  # fmt: skip

    @property
    def score_name(self) -> str:
        """The figure that the curve is drawn of."""
        return "accuracy" if self.classes else "r2"

    @property
    def positions(self) -> list[str]:
        return list(dict.fromkeys(line.positions for line in self.lines))

    @property
    def sites(self) -> list[Site]:
        return list(dict.fromkeys(line.site for line in self.lines))

    @property
    def best(self) -> ProbeLine:
        """The one with the highest accuracy (R2), of equals the first; chosen on the very rows that it is scored on, so that
        with many probes its figure is a little too good."""
        return max(self.lines, key=lambda line: line.score.headline.value)

    def at(self, site: Site | str | int, positions: str | None = None) -> ProbeLine:
        """The line of a site; UserError for one that is not there."""
        wanted = Site.parse(site)
        for line in self.lines:
            if line.site == wanted and positions in (None, line.positions):
                return line
        raise UserError(f"no probe at {wanted}{f', positions {positions}' if positions else ''}; there are "
                        f"{', '.join(map(str, self.sites))} at positions {', '.join(self.positions)}")  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One line for each probe: its figures with 95 % intervals, the controls', `words`, chance and counts."""
        import pandas as pd

        lines = []
        for line in self.lines:
            words = self.words.get(line.positions)
            head = {} if words is None else {"words": words.headline.value, "words_low": words.headline.low,
                                             "words_high": words.headline.high}  # fmt: skip
            lines.append(line.as_dict() | head)
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        from html import escape

        notes = "".join(f"<br><small>{escape(note)}</small>" for note in self.notes)
        table = self.frame().to_html(index=False, escape=True, float_format=lambda v: f"{v:.3f}")
        return f"<p>{escape(repr(self))}{notes}</p>{table}"
