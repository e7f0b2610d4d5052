"""The tuned lens: an affine translator per layer, started in closed form and fitted to the model's own predictions."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.maps.linear_map import LinearMap
from workbench.maps.moments import Moments
from workbench.maps.ridge import ALPHAS, Choice, penalty
from workbench.maps.spectrum import Spectrum
from workbench.models import Model
from workbench.progress import progress
from workbench.prompts import PromptSet
from workbench.sites import Site

from .lens import Lens, site_word, translated_sites
from .lens_rows import BATCH_TOKENS, Rows, batches_of, iter_rows, split_prompts
from .lens_scores import LensScores, divergence, lens_scores
from .unembedding import Unembedding

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("workbench")
FLOOR = 1e-3
"""variances of the source below this share of their mean are taken to be that large where steps are scaled by them"""
CUTS, CUT = 3, 0.3
"""how often, and by what, the step is cut where an epoch brought nothing, before a layer is done"""
BETTER = 1e-3
"""share of its KL that an epoch must take off to count"""


@dataclass(frozen=True, eq=False)
class TunedLensFit:
    """A tuned lens, and what it is worth on prompts that neither its fit nor its stopping saw."""

    lens: Lens
    scores: LensScores
    """of `logit`, `start` (closed form) and `tuned` on the held-out prompts"""
    starts: dict[Site, str]
    """where each translator started: `transport` (ridge from this site to the last) or `identity`, whichever was nearer"""
    kept_start: tuple[Site, ...]
    """sites whose fit was no better than its start on the held-out prompts, which have their start"""
    epochs: dict[Site, int]

    def __repr__(self) -> str:
        return f"TunedLensFit({self.lens!r}, {self.scores!r})"

    def frame(self) -> pd.DataFrame:
        """One line per site: kl_logit, kl_start, kl_tuned and change (tuned less logit) with their intervals, in nats per
        token; start, kept_start, epochs."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for site in self.starts:
            line: dict[str, Any] = {"site": str(site), "layer": site_word(site)}
            cells = {f"kl_{name}": self.scores.mean_kl(name, site) for name in self.scores.lenses}
            for name, cell in {**cells, "change": self.scores.change("logit", "tuned", site)}.items():
                line |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
            lines.append(line | {"start": self.starts[site], "kept_start": site in self.kept_start,
                                 "epochs": self.epochs[site]})  # fmt: skip
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format))


def fit_tuned_lens(
    model: Model,
    prompts: Any,
    *,
    sites: Sequence[Site | str | int] | None = None,
    alpha: Choice = "gcv",
    epochs: int = 30,
    step: float = 0.1,
    holdout: float = 0.2,
    seed: int = 0,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> TunedLensFit:
    """Fits a translator for each site: KL(final || lens) over the tokens of the prompts, a BOS left out.

    Prompts are split in three, and what says the same stays together: `holdout` for the figures, half as many to stop
    by, the rest for the fit. Each translator starts as the ridge map from its site to the last (the transport operator,
    from moments), or as the identity where that is nearer to the model on the prompts to stop by; Adam then follows the
    KL in coordinates in which the states of the site vary equally in all directions, so that one step does for every
    layer and model; a layer whose KL on the prompts to stop by no longer falls goes back to its best and takes smaller
    steps, and ends after some of these. One that is then no better than its start on the held-out prompts keeps the
    start, and the result says so.

    Args:
        prompts: anything that `PromptSet.load` reads.
        sites: all but the last block's output, unless given.
        alpha: ridge penalty of the start, in units of the mean diagonal: a number, or `gcv`.
        epochs: at most so many times over the prompts; 0 keeps the closed form.
        step: of Adam, over sqrt(width).
        max_length: tokens of each prompt that are read.

    Raises:
        UserError: too few different prompts, a site that is none of a lens, a share that leaves nothing.

    >>> fit_tuned_lens(load("bundled:recipient"), "bundled:profile").frame()    # doctest: +SKIP

    Source: arXiv:2303.08112. There the start is the identity and the optimiser SGD with momentum over a fixed number of
    steps; the loss is the same.
    """
    if not 0 < holdout < 0.6 or epochs < 0 or not step > 0:
        raise UserError(
            f"holdout={holdout:g} must lie in 0..0.6, epochs={epochs} be 0 or more, and step={step:g} above 0"
        )
    if alpha == "cv":
        raise UserError('alpha of the start is a number or "gcv": folds would hold every moment once for each of them')
    read = PromptSet.load(prompts)
    sequences, unembed = Sequences.of(model, read, max_length), Unembedding.of(model)
    train, stop, held = split_prompts(read, sequences, (1 - 1.5 * holdout, holdout / 2, holdout), seed)
    chosen = translated_sites(model, sites)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "unembedding": unembed}
    fits = [_Fit(site, spectrum, alpha, model, step) for site, spectrum in
            _spectra(model, sequences, train, chosen, batch_tokens).items()]  # fmt: skip
    _choose_starts(model, sequences, stop, fits, options)
    draw = random.Random(seed)
    with progress(total=epochs, desc=f"tuned lens of {model.name}", unit="epoch") as bar:
        for _ in range(epochs):
            left = [fit for fit in fits if not fit.done]
            if not left:
                break
            _epoch(model, sequences, batches_of(sequences, train, batch_tokens, draw=draw), left, unembed)
            found = lens_scores(
                model, sequences, {"now": _lens(model, left)}, among=stop, sites=[f.site for f in left], **options
            )
            for fit in left:
                fit.judge(found.mean_kl("now", fit.site).value)
            bar.update(1)
    for fit in fits:
        fit.restore()
    return _result(model, sequences, held, fits, options, {
        "prompts": read.name, "prompts_hash": read.hash, "train": len(train), "stop": len(stop), "held_out": len(held),
        "seed": seed, "alpha": alpha, "step": step, "epochs": epochs,
    })  # fmt: skip


def _result(model: Model, sequences: Sequences, held: list[int], fits: list[_Fit], options: dict[str, Any],
            about: dict[str, Any]) -> TunedLensFit:  # fmt: skip
    """Scores on the held-out prompts; translators that are worse than their start there go back to it."""
    start, tuned = _lens(model, fits, start=True), _lens(model, fits)
    lenses = {"logit": Lens(), "start": start, "tuned": tuned}
    scores = lens_scores(model, sequences, lenses, among=held, sites=[fit.site for fit in fits], **options)
    worse = [i for i, fit in enumerate(fits) if fit.moved and scores.change("start", "tuned", fit.site).value > 0]
    if worse:
        names = ", ".join(str(fits[i].site) for i in worse)
        log.warning("the fit at %s is worse than its start on held-out prompts, which is kept", names)
    kl, agree = scores.kl.clone(), scores.agree.clone()
    for i in worse:
        fits[i].back()
        kl[2, i], agree[2, i] = kl[1, i], agree[1, i]
    scores = LensScores(scores.model, scores.lenses, scores.sites, kl, agree, scores.tokens)
    kept = tuple(fit.site for fit in fits if not fit.moved)
    found = TunedLensFit(
        _lens(model, fits), scores, {f.site: f.start_name for f in fits}, kept, {f.site: f.epochs for f in fits}
    )
    lens = Lens("tuned", found.lens.translators, dict(model.fingerprint), {**about, "figures": _plain(found.frame())})
    return TunedLensFit(lens, scores, found.starts, kept, found.epochs)


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a frame as JSON values, numbers to six figures."""
    lines: list[dict[str, Any]] = frame.to_dict(orient="records")  # type: ignore[assignment]
    return [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()} for line in lines]


def _spectra(
    model: Model, sequences: Sequences, train: list[int], sites: list[Site], tokens: int
) -> dict[Site, Spectrum]:
    """The spectrum of each site over the training prompts, with its products with the last, from one pass."""
    end = Site(model.n_layers - 1)
    sums: dict[Site, Moments] = {site: Moments(pairs=[("x", "y")], products=torch.float32) for site in sites}
    for rows in iter_rows(model, sequences, [*sites, end], batches_of(sequences, train, tokens)):
        y = rows.states[end].float()
        for site in sites:
            sums[site].update({"x": rows.states[site].to(y), "y": y})
    return {site: Spectrum.of(moments) for site, moments in sums.items()}


def _choose_starts(
    model: Model, sequences: Sequences, stop: list[int], fits: list[_Fit], options: dict[str, Any]
) -> None:
    """Each site's start: the ridge map or the identity, whichever has the lower KL on the prompts to stop by."""
    lenses = {"transport": _lens(model, fits), "identity": Lens()}
    scores = lens_scores(model, sequences, lenses, among=stop, sites=[fit.site for fit in fits], **options)
    for fit in fits:
        values = {name: scores.mean_kl(name, fit.site).value for name in lenses}
        fit.begin(min(values, key=lambda name: values[name]), min(values.values()))


def _lens(model: Model, fits: Sequence[_Fit], *, start: bool = False) -> Lens:
    return Lens("tuned", {fit.site: fit.start if start else fit.translator() for fit in fits})


def _epoch(
    model: Model, sequences: Sequences, batches: list[list[int]], fits: list[_Fit], unembed: Unembedding
) -> None:
    end = Site(model.n_layers - 1)
    for rows in iter_rows(model, sequences, [*(fit.site for fit in fits), end], batches):
        _step(rows, end, fits, unembed)


def _step(rows: Rows, end: Site, fits: list[_Fit], unembed: Unembedding) -> None:
    """One step of every site on one batch; logits are made a few rows at a time, for one site after another."""
    count = len(rows.prompt)
    for part in unembed.batches(rows.states[end]):
        with torch.no_grad():
            p = unembed.log_probabilities(rows.states[end][part])
        for fit in fits:
            with torch.enable_grad():
                q = unembed.log_probabilities(fit.forward(rows.states[fit.site][part]))
                loss = divergence(p, q).sum() / count
                # of these two alone: the model's own parameters get no gradient
                grads = torch.autograd.grad(loss, [fit.weight, fit.bias])
            fit.add(grads)
    for fit in fits:
        fit.optimizer.step()
        fit.optimizer.zero_grad()


@dataclass(eq=False)
class _Fit:
    """One site's translator while it is fitted: its start, and what is added to that in whitened coordinates.

    x @ A + b + ((x - mean) @ whiten @ weight + bias) * scale, of which weight and bias are fitted.
    """

    site: Site
    spectrum: Spectrum
    alpha: Choice
    model: Model
    step: float
    start_name: str = "transport"
    epochs: int = 0
    done: bool = False
    cuts: int = 0
    best: float = torch.inf
    first: float = torch.inf
    kept: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        s = self.spectrum
        place = s.vectors.device
        alpha = penalty(self.alpha) if self.alpha != "gcv" else self._gcv()
        ridge = s.ridge("y", alpha * s.unit)
        weight = ridge.weight - torch.eye(ridge.d_in, dtype=torch.float64, device=place)
        self.start = LinearMap(weight.float(), ridge.bias.float(), {"method": "ridge", "alpha": alpha})
        variances = s.values.clamp_min(FLOOR * s.unit) / s.train.n
        self.whiten = (s.vectors / variances.sqrt()).float()
        self.mean = s.x_mean.float()
        left = s.train.squares("y") - (ridge.weight * s.covariance("x", "y")).sum(0)
        self.scale = float((left.clamp_min(0).mean() / s.train.n).sqrt()) or 1.0
        self.weight = torch.zeros(ridge.d_in, ridge.d_in, device=place, requires_grad=True)
        self.bias = torch.zeros(ridge.d_in, device=place, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=self.step / ridge.d_in**0.5, betas=(0.9, 0.99))
        self._keep()
        self.spectrum = None  # type: ignore[assignment]  # two matrices of it were wanted

    def _gcv(self) -> float:
        s = self.spectrum
        scores = s.gcv("y", [a * s.unit for a in ALPHAS])
        return ALPHAS[int(scores.argmax())]

    @property
    def moved(self) -> bool:
        return bool(self.weight.any() or self.bias.any())

    def begin(self, name: str, kl: float) -> None:
        self.start_name, self.best, self.first = name, kl, kl
        if name == "identity":
            self.start = LinearMap.zeros(len(self.bias), len(self.bias)).to(self.bias.device)

    def forward(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        h = states.float().to(self.bias.device)
        return h + self.start(h) + ((h - self.mean) @ self.whiten @ self.weight + self.bias) * self.scale

    def add(self, grads: Sequence[Tensor]) -> None:
        for one, grad in zip((self.weight, self.bias), grads, strict=True):
            one.grad = grad if one.grad is None else one.grad + grad

    def judge(self, kl: float) -> None:
        """Keeps what an epoch made, or goes back to the best so far and takes smaller steps."""
        self.epochs += 1
        better = kl < self.best * (1 - BETTER)
        if kl < self.best:
            self.best = kl
            self._keep()
        if better:
            return
        self.cuts += 1
        self.done = self.cuts > CUTS
        self.restore()
        for group in self.optimizer.param_groups:
            group["lr"] *= CUT

    def _keep(self) -> None:
        self.kept = self.weight.detach().clone(), self.bias.detach().clone()

    def restore(self) -> None:
        with torch.no_grad():
            self.weight.copy_(self.kept[0])
            self.bias.copy_(self.kept[1])

    def back(self) -> None:
        """To the start."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()

    def translator(self) -> LinearMap:
        with torch.no_grad():
            added = (self.whiten.double() @ self.weight.double()) * self.scale
            weight = self.start.weight.double() + added
            bias = self.start.bias.double() + self.bias.double() * self.scale - self.mean.double() @ added
        return LinearMap(weight.float(), bias.float(), {"method": "tuned"})
