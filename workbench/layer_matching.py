"""Which layer of the recipient answers to which layer of the donor: by depth, by likeness, by held-out fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import UserError
from .progress import progress

if TYPE_CHECKING:
    from .convert import ConverterFits
    from .sites import Site

BY_DEPTH = ("nearest", "floor", "ends")
BY_SCORE = ("cka", "svcca", "r2")
MATCHES = (*BY_DEPTH, *BY_SCORE)


def match_layers(
    donor_layers: Sequence[int],
    n_donor: int,
    n_recipient: int,
    policy: str = "nearest",
    recipient_layers: Sequence[int] | None = None,
) -> dict[int, int]:
    """Which recipient layer answers to each donor layer, by relative depth: {donor: recipient}.

    nearest: the recipient layer nearest to l * n_recipient / n_donor, ties to the lower (the released code of
    Command-V); floor: the largest not above it (its paper's formula, arXiv:2506.19140); ends: the nearest to
    l * (n_recipient - 1) / (n_donor - 1), so that first answers to first and last to last. Keys are always donor layers:
    the released code turns the map round where both lists have one length. Raises UserError for unknown policies and
    layers out of range.

    >>> match_layers([0, 2, 4], 28, 32), match_layers([0, 2, 4], 28, 32, "floor")
    ({0: 0, 2: 2, 4: 5}, {0: 0, 2: 2, 4: 4})
    """
    targets = sorted(range(n_recipient) if recipient_layers is None else recipient_layers)
    for name, layers, n in (("donor", donor_layers, n_donor), ("recipient", targets, n_recipient)):
        wrong = [l for l in layers if not 0 <= l < n]
        if wrong or not layers:
            raise UserError(f"{name} layers {wrong} are out of range: allowed 0 to {n - 1}, and at least one")
    scale = n_recipient / n_donor
    if policy == "ends":
        scale = (n_recipient - 1) / max(n_donor - 1, 1)
    if policy in ("nearest", "ends"):
        return {l: min(targets, key=lambda t: (abs(t - scale * l), t)) for l in donor_layers}
    if policy == "floor":
        return {
            l: max((t for t in targets if t <= l * n_recipient // n_donor), default=targets[0]) for l in donor_layers
        }
    raise UserError(
        f"unknown layer matching {policy!r} by depth; allowed: {', '.join(BY_DEPTH)} ({', '.join(BY_SCORE)} and forecast "
        "need profiles)"
    )


def best_matching(scores: Mapping[tuple[int, int], float], monotone: bool = True) -> dict[int, int]:
    """The matching {donor: recipient} with the largest summed score; recipient layers never fall when monotone.

    scores: of each (donor layer, recipient layer): likeness, held-out R2 or a forecast. Dynamic programming over donor layers.
    """
    donors, recipients = sorted({d for d, _ in scores}), sorted({r for _, r in scores})
    if not monotone:
        return {d: max(recipients, key=lambda r: (scores[d, r], -r)) for d in donors}
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        r: (0.0, ()) for r in recipients
    }  # best score of a path that ends at or below r
    for d in donors:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        top: tuple[float, tuple[int, ...]] = (float("-inf"), ())
        for r in recipients:
            score, path = best[r]
            top = max(top, (score + scores[d, r], (*path, r)), key=lambda t: t[0])
            reached[r] = top
        best = reached
    return dict(zip(donors, best[recipients[-1]][1], strict=True))


def layer_scores(
    fits: ConverterFits, donors: Sequence[Site], recipients: Sequence[Site], by: str = "cka", alpha: float = 0.1
) -> dict[tuple[int, int], float]:
    """How well each recipient layer answers to each donor layer, {(donor, recipient): score}: what `best_matching` takes.

    by: `cka` (debiased) or `svcca`, how alike the fitted rows are; `r2`, the held-out R2 (variance-weighted) of the map to
    the donor at ridge `alpha`. None of them says whether a paste will work. Raises UserError for another name.
    """
    if by not in BY_SCORE:
        raise UserError(f"unknown score of layers {by!r}; allowed: {', '.join(BY_SCORE)}")
    table = {}
    for d in progress(donors, desc=f"layers by {by}", unit="layer"):
        for r in recipients:
            if by == "r2":
                table[d.layer, r.layer] = fits.held_out_r2(d, r, alpha)
            else:
                table[d.layer, r.layer] = fits.cka(d, r) if by == "cka" else fits.factors(d, r).svcca()
    return table


def matched_sites(
    fits: ConverterFits,
    donors: Sequence[Site],
    recipients: Sequence[Site],
    match: str = "nearest",
    *,
    n_donor: int | None = None,
    n_recipient: int | None = None,
    alpha: float = 0.1,
) -> dict[int, int]:
    """{donor layer: recipient layer} by any matching but the forecast's (`forecast.matched_candidates`).

    n_donor, n_recipient: layers of the models, for the matchings by depth; of the profiles' models unless given.
    """
    if match in BY_SCORE:
        return best_matching(layer_scores(fits, donors, recipients, match, alpha))
    depths = [s.manifest["model"]["n_layers"] for s in (fits.donor, fits.recipient)]
    return match_layers([s.layer for s in donors], n_donor or depths[0], n_recipient or depths[1], match,
                        [s.layer for s in recipients])  # fmt: skip
