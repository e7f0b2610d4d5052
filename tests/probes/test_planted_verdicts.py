"""Sparse features that overlap, planted as transported, rotated and synthesised, against the verdicts as they ship."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.dictionaries import Dictionary
from probes.features import row_batches
from probes.verdicts import FeatureVerdicts, feature_verdicts
from workbench.maps.fit import fit_ridge

D, EACH, N, RATE = 512, 100, 16_000, 0.05
KINDS = ["transported"] * EACH + ["rotated"] * EACH + ["synthesised"] * EACH
"""of the last, half are the size of something whose sign is at the source, and half are drawn on the way"""


def planted_verdicts(noise: float, seed: int) -> FeatureVerdicts:
    """300 features in random directions of the target, none at a right angle to another; each fires on 5 % of the tokens,
    with 0.5 + an exponential. At the source lie, in random directions: the transported ones where they are, half to twice
    as large; the rotated ones elsewhere; half of the synthesised ones elsewhere, with a sign that the target does not
    have. Source and target have noise of their own, of standard deviation `noise` in every dimension."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def directions(n: int) -> Tensor:
        return torch.nn.functional.normalize(draw(n, D))

    f, even = 3 * EACH, slice(2 * EACH, 2 * EACH + EACH // 2)
    u = directions(f)
    fires = torch.rand(N, f, generator=g) < RATE
    size = fires * (0.5 - torch.rand(N, f, generator=g).log())
    sign = torch.where(draw(N, EACH // 2) < 0, -1.0, 1.0)
    x = size[:, :EACH] * (0.5 + 1.5 * torch.rand(EACH, generator=g)) @ u[:EACH] + noise * draw(N, D)
    x += size[:, EACH : 2 * EACH] @ directions(EACH) + sign * size[:, even] @ directions(EACH // 2)
    y = size @ u + noise * draw(N, D)
    dictionary = Dictionary(
        u.T.contiguous(), torch.zeros(f), u, torch.zeros(D), "jumprelu", threshold=torch.full((f,), 0.7)
    )
    train = 3 * N // 4
    operator, control = (fit_ridge(x[:train], rows, alpha="gcv").map
                         for rows in (y[:train], y[torch.randperm(train, generator=g)]))  # fmt: skip
    return feature_verdicts(operator, dictionary, row_batches(x[train:], y[train:]), control=control)


def test_features_planted_as_transported_rotated_and_synthesised_are_told_apart():
    """A tenth of the target's variance is noise."""
    found = planted_verdicts(0.1, seed=0)
    pairs = list(zip(found.verdict, KINDS, strict=True))
    assert sum(verdict == kind for verdict, kind in pairs) / len(pairs) > 0.99
    two = [(verdict, kind) for verdict, kind in pairs if kind != "rotated"]
    assert sum(verdict == kind for verdict, kind in two) / len(two) > 0.99


def test_in_more_noise_fewer_are_found_and_what_was_not_there_still_is_not():
    found = planted_verdicts(0.2, seed=1)
    assert set(found.verdict[2 * EACH :]) == {"synthesised"}
    assert "transported" not in found.verdict[EACH:]
    assert found.verdict[:EACH].count("transported") < EACH
