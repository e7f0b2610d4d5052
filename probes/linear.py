"""Linear probes of a store: a label read from stored activations, layer by layer, beside controls that can know nothing of it.

Sources: control tasks and selectivity, arXiv:1909.03368 (there for token types; where the label is the prompt's, the
control's labels hang on the prompt); mass-mean probes, arXiv:2310.06824.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import UserError
from workbench.progress import progress
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .baselines import word_features
from .held_out_scores import HeldOut, class_scores, difference, quantity_scores
from .labels import Labels, labels_of
from .probe import Probe
from .probe_curve import ProbeCurve, ProbeLine
from .solvers import PENALTY, Fitted, Solver
from .splits import held_out, rows_at, sample

log = logging.getLogger("workbench")
MOST_ROWS = 20_000
CONTROLS = ("control", "shuffled")


def train_probes(
    store: Store | ResidentRows,
    label: Any,
    *,
    sites: Sequence[Site | str | int] | None = None,
    positions: str | Sequence[str] = "all",
    kind: str = "logistic",
    penalty: float | None = None,
    classes: Sequence[str] | None = None,
    quantity: bool | None = None,
    groups: Any = None,
    holdout: float = 0.25,
    controls: Sequence[str] = CONTROLS,
    words: bool = True,
    max_rows: int = MOST_ROWS,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeCurve:
    """Probes of a label at sites x positions, each scored on prompts that it has not seen.

    Args:
        store: a Store; or ResidentRows, whose device is then used.
        label, classes, quantity, groups: see `labels.labels_of`; rows of one group (unless given, of one prompt, wherever it
            stands) are never on both sides of the split.
        sites: all of the store unless given. positions: one or several of `splits.POLICIES`.
        kind: logistic, ridge, mass_mean, mass_mean_cov or sparse; see `solvers.KINDS`. penalty: in units of the mean loss per
            row, on rows scaled to unit variance; `solvers.PENALTY` unless given.
        holdout: share of the prompts that is held out. controls: of `control` (a control task) and `shuffled`.
        words: whether the same is tried from the token ids, or the words of the prompt, alone.
        max_rows: rows looked at, training and held out together: of more, so many are drawn, and a note says so.
        device: None: a GPU where there is one. There logistic probes are solved by L-BFGS in torch (see `solvers.TOLERANCE`
            for how well it agrees); sparse ones and all on a CPU by scikit-learn.

    Raises UserError for labels that cannot be probed (see `labels_of`, `splits.held_out`) and unknown arguments.

    >>> train_probes(store, "label", classes=["refusal"], positions="last")                # doctest: +SKIP
    ProbeCurve(logistic of 'label', 4 probes, best accuracy 0.996 [0.986, 1.000] at resid_post.2, positions last)
    """
    rows = store if isinstance(store, ResidentRows) else ResidentRows(store, device, keep=False)
    wanted = [positions] if isinstance(positions, str) else list(positions)
    unknown = set(controls) - set(CONTROLS)
    if unknown or not wanted or max_rows < 8:
        raise UserError(
            f"unknown controls {', '.join(sorted(unknown))}; allowed: {', '.join(CONTROLS)}" if unknown
            else f"positions {wanted} and max_rows={max_rows}: give at least one choice of positions and 8 rows"
        )  # fmt: skip
    places = rows.store.sites if sites is None else [_site(rows.store, s) for s in sites]
    known = labels_of(rows.store, label, classes=classes, quantity=quantity, groups=groups)
    strength = PENALTY.get(kind, 0.0) if penalty is None else float(penalty)
    tasks = [_Task.of(rows, known, one, holdout, max_rows, seed) for one in wanted]
    lines: list[ProbeLine] = []
    notes = list(known.notes)
    with progress(total=len(tasks) * len(places), desc="probes", unit="probe") as bar:
        for task in tasks:
            arms = {name: Solver(kind, len(known.classes), strength, rows.device) for name in ("label", *controls)}
            for site in places:
                lines.append(task.at(site, arms, notes))
                bar.update(1)
    baselines = {task.positions: task.words(strength) for task in tasks} if words else {}
    settings = {"store": str(rows.store.path), "penalty": strength, "holdout": holdout, "seed": seed, "max_rows": max_rows,
                "model": rows.store.name, "device": str(rows.device)}  # fmt: skip
    return ProbeCurve(known.name, kind, known.classes, tuple(lines), {k: v for k, v in baselines.items() if v is not None},
                      "prompt" if known.per_group else "token", tuple(dict.fromkeys([*notes, *_limits(tasks, lines)])),
                      settings)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Task:
    """The rows of one choice of positions, their split, and the labels of the arms."""

    rows: ResidentRows
    labels: Labels
    positions: str
    test: np.ndarray
    seed: int

    @classmethod
    def of(cls, rows: ResidentRows, known: Labels, positions: str, holdout: float, most: int, seed: int) -> _Task:
        chosen = rows_at(positions, rows.store.prompt_index.numpy())[known.rows]
        if not chosen.any():
            raise UserError(
                f"positions {positions!r} name no row with a label; the store keeps tokens {rows.store.tokens}"
            )
        here = sample(known.take(np.flatnonzero(chosen)), most, seed)
        if here.classes and len(np.unique(here.values)) < 2:
            raise UserError(f"label {known.name!r} is {here.classes[here.values[0]]!r} in every row at positions {positions}; "
                            "a probe needs two classes")  # fmt: skip
        return cls(rows, here, positions, held_out(here, holdout, seed), seed)

    def at(self, site: Site, arms: dict[str, Solver], notes: list[str]) -> ProbeLine:
        """The probe of a site and its controls."""
        x = self.rows.take(site, torch.from_numpy(self.labels.rows)).float()
        task, whole = self, torch.isfinite(x).all(1).cpu().numpy()
        if not whole.all():
            notes.append(f"{site}: {int((~whole).sum()):,} of {len(whole):,} rows are not finite and were left out")
            x, task = x[torch.from_numpy(whole).to(x.device)], self._where(whole, site)
        train = torch.from_numpy(~task.test).to(x.device)
        learned, tested = x[train], x[~train]
        made = arms["label"].fit(learned, task.labels.values[~task.test])
        score = task._scored(made, tested, task.labels.values)
        found: dict[str, HeldOut | None] = dict.fromkeys(CONTROLS)
        for name in CONTROLS:
            if name in arms:
                y = task.drawn(name)
                fitted = _fitted(arms[name], learned, y[~task.test])
                if fitted is not None:
                    found[name] = task._scored(fitted, tested, y if name == "control" else task.labels.values)
        control = found["control"]
        selectivity = None if control is None else difference(score, control)
        probe = task._probe(made, learned, site, arms["label"], score)
        return ProbeLine(
            self.positions, probe, score, control, found["shuffled"], selectivity, len(learned), made.converged
        )

    def _where(self, whole: np.ndarray, site: Site) -> _Task:
        y = self.labels.values
        for side in (~self.test, self.test):
            if len(np.unique(y[side & whole])) < 2:
                raise UserError(f"{site}: too few of its rows are finite to learn {self.labels.name!r} from "
                                f"({int(whole.sum()):,} of {len(whole):,}); profile again in another dtype, or leave "
                                "this site out")  # fmt: skip
        return replace(self, labels=self.labels.take(np.flatnonzero(whole)), test=self.test[whole])

    def drawn(self, name: str) -> np.ndarray:
        """The labels of a control: of `control` by token type (by prompt where the label is the prompt's); of `shuffled` the
        true ones in another order."""
        known, rng = self.labels, np.random.default_rng([self.seed, CONTROLS.index(name)])
        if name == "shuffled" and not known.per_group:
            return rng.permutation(known.values)
        keys = known.groups if known.per_group else self._types()
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        if known.per_group:
            return rng.permutation(known.values[first])[which]
        return rng.choice(known.values, len(first))[which]

    def _types(self) -> np.ndarray:
        """The token of each row."""
        return self.rows.store.rows(["token_id"])["token_id"].fillna(-1).to_numpy()[self.labels.rows]

    def _scored(self, made: Fitted, x: Tensor, y: np.ndarray) -> HeldOut:
        return _scores(x.double().cpu().numpy() @ made.weight + made.bias, self, y)

    def _probe(self, made: Fitted, x: Tensor, site: Site, solver: Solver, score: HeldOut) -> Probe:
        known, y = self.labels, torch.from_numpy(self.labels.values[~self.test]).to(x.device)
        parts = [x[y == k] for k in range(len(known.classes))] or [x]
        means = torch.stack([part.mean(0, dtype=torch.float64) for part in parts]).float().cpu()
        seen = torch.from_numpy(np.unique(known.groups[~self.test]))
        head = score.headline
        meta = {"positions": self.positions, "penalty": solver.penalty, "seed": self.seed, "n_train": len(x),
                "held_out": {"n": score.n, "prompts": score.n_groups, **head.as_dict()},
                "prompts": self.rows.store.prompt_hash, "converged": made.converged}  # fmt: skip
        return Probe(torch.from_numpy(made.weight).float(), torch.from_numpy(made.bias).float(), known.classes, site,
                     known.name, solver.kind, means, seen, dict(self.rows.store.fingerprint), meta)  # fmt: skip

    def words(self, penalty: float) -> HeldOut | None:
        """The same task from the token ids, or the words of the prompt, alone; None where the store does not know them."""
        x = word_features(self.rows.store, self.labels)
        if x is None:
            return None
        from sklearn.linear_model import LogisticRegression, Ridge

        y, n = self.labels.values, int((~self.test).sum())
        if not self.labels.classes:
            model = Ridge(alpha=0.01 * n, solver="sparse_cg").fit(x[~self.test], y[~self.test])
            return _scores(model.predict(x[self.test])[:, None], self, y)
        made = LogisticRegression(C=1 / (1e-3 * n), max_iter=1000).fit(x[~self.test], y[~self.test])
        return _scores(np.asarray(made.decision_function(x[self.test])).reshape(int(self.test.sum()), -1), self, y)


def _scores(scores: np.ndarray, task: _Task, y: np.ndarray) -> HeldOut:
    """The figures of the held-out rows' scores [n, c]; y are the labels of all rows."""
    test, groups = task.test, task.labels.groups[task.test]
    if not task.labels.classes:
        return quantity_scores(scores[:, 0], y[test], groups, float(y[~test].mean()), seed=task.seed)
    counts = np.bincount(y[~test], minlength=len(task.labels.classes))
    chance = float((y[test] == counts.argmax()).mean())
    logits = torch.from_numpy(np.concatenate([np.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores)
    return class_scores(logits.softmax(1).numpy(), y[test], groups, chance, seed=task.seed)


def _fitted(solver: Solver, x: Tensor, y: np.ndarray) -> Fitted | None:
    """The probe of labels that were drawn; None where the draw left out a class of so few prompts."""
    return solver.fit(x, y) if not solver.n_classes or len(np.unique(y)) == solver.n_classes else None


def _limits(tasks: Sequence[_Task], lines: Sequence[ProbeLine]) -> list[str]:
    """What limits the figures, in words."""
    found = [note for task in tasks for note in task.labels.notes]
    widest = max(lines, key=lambda line: line.probe.width / line.n_train)
    if widest.n_train < widest.probe.width:
        found.append(f"rows are few for the width ({widest.n_train:,} for {widest.probe.width:,}): what a probe fits is then "
                     "the penalty's choice; judge it by the controls")  # fmt: skip
    slow = sum(not line.converged for line in lines)
    if slow:
        found.append(f"{slow} of {len(lines)} probes stopped before they converged; a larger penalty helps")
    few = min(line.score.n_groups for line in lines)
    if few < 20:
        found.append(f"only {few} prompts are held out: the intervals over them are rough")
    return found


def _site(store: Store, site: Site | str | int) -> Site:
    wanted = Site.parse(site, store.manifest["model"]["n_layers"])
    store.width(wanted)  # says which sites there are
    return wanted
