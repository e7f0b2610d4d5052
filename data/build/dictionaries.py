"""Trains the bundled dictionaries: small sparse autoencoders of the recipient's residual stream, one per layer.

BatchTopK (arXiv:2412.06410): in training, of all activations of a batch the k * batch largest are kept; the running mean
of the smallest of them is the threshold with which the dictionary is then used, as JumpReLU. Features that have long been
silent are taught what the others leave over (arXiv:2406.04093).
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from probes.dictionaries import Dictionary
from workbench import load
from workbench.evaluate.causal import choose, constant, run_arm
from workbench.evaluate.scoring import Scores, Sequences, ratio_interval, score
from workbench.evaluate.statistics import Interval, wilson
from workbench.models import Model
from workbench.rendering import special_ids

from . import language
from .train import draw_training, encode

LAYERS = (1, 2, 3)
TOKENS, HELD_OUT = 240_000, 600  # tokens to train on, sequences to measure on


@dataclass(frozen=True)
class Recipe:
    """How one dictionary is trained."""

    layer: int
    features: int = 768
    k: int = 12
    steps: int = 3000
    batch: int = 1024
    peak: float = 2e-3
    silent: int = 150  # steps without firing after which a feature is taught by the auxiliary loss
    seed: int = 11


def held_out_sample(rng: random.Random) -> language.Sample:
    """The training mixture's kinds, of contents that no other split has."""
    kind = rng.choice((*language.BEHAVIOURS, "plain"))
    return language.draw(rng, kind, "evaluation", neutral=rng.random() < 0.35)


def states(model: Model, rows: list[list[int]], layer: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """The rows [n, d] of resid_post at every token that is not special, and the sequence of each."""
    site, special = model.site(layer), torch.tensor(sorted(special_ids(model.tokenizer)))
    parts, owners = [], []
    with torch.inference_mode(), model.read([site]) as seen:
        for start in range(0, len(rows), size):
            width = max(map(len, rows[start : start + size]))
            ids = torch.full((len(rows[start : start + size]), width), model.pad_id)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows[start : start + size]):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            model.run(ids, mask, stop_after=layer)
            keep = mask.bool() & ~torch.isin(ids, special)
            parts.append(seen[site][keep].clone())
            owners.append(keep.nonzero()[:, 0] + start)
    return torch.cat(parts), torch.cat(owners)


def train(rows: Tensor, recipe: Recipe, log=print) -> Dictionary:
    """A JumpReLU dictionary of these rows; the same rows and recipe give the same one."""
    generator = torch.Generator().manual_seed(recipe.seed + recipe.layer)
    mean, d = rows.mean(0), rows.shape[1]
    scale = (d**0.5 / (rows - mean).norm(dim=1).mean()).item()  # so that one recipe serves every layer
    x = (rows - mean) * scale
    W_dec = torch.nn.functional.normalize(torch.randn(recipe.features, d, generator=generator), dim=1)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(recipe.features), torch.zeros(d)
    weights = [w.requires_grad_() for w in (W_enc, b_enc, W_dec, b_dec)]
    optimizer = torch.optim.Adam(weights, lr=recipe.peak, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 100, 5 * (1 - s / recipe.steps)))
    since, threshold, began = torch.zeros(recipe.features), 0.0, time.perf_counter()
    for step in range(recipe.steps):
        batch = x[torch.randint(len(x), (recipe.batch,), generator=generator)]
        p = ((batch - b_dec) @ W_enc + b_enc).relu()
        least = p.detach().flatten().kthvalue(p.numel() - recipe.k * recipe.batch).values.item()
        a = torch.where(p > least, p, 0.0)
        error = batch - (a @ W_dec + b_dec)
        loss = error.square().sum(1).mean() + _auxiliary(p, W_dec, error.detach(), since > recipe.silent)
        loss.backward()
        with torch.no_grad():
            along = (W_dec.grad * W_dec).sum(1, keepdim=True)
            W_dec.grad -= along * W_dec  # length 1 is kept, so that nothing is won by growing
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        since = torch.where((a > 0).any(0), 0.0, since + 1)
        threshold = least if step == 0 else 0.99 * threshold + 0.01 * least
        if step % 500 == 0:
            share = 1 - error.square().sum().item() / (batch - batch.mean(0)).square().sum().item()
            silent, seconds = int((since > recipe.silent).sum()), time.perf_counter() - began
            log(f"layer {recipe.layer} step {step}: explained {share:.3f}, silent {silent}, {seconds:.0f} s")
    # written for plain rows: z = (h - mean) * scale is folded into the weights
    with torch.no_grad():
        bias = b_enc - (mean * scale + b_dec) @ W_enc
        return Dictionary((W_enc * scale).detach(), bias, (W_dec / scale).detach(), b_dec / scale + mean, "jumprelu",
                          threshold=torch.full((recipe.features,), threshold), site=f"resid_post.{recipe.layer}",
                          model="bundled:recipient")  # fmt: skip


def _auxiliary(p: Tensor, W_dec: Tensor, left: Tensor, silent: Tensor) -> Tensor:
    """What the silent features' own largest activations leave of the error, at 1/32 of the loss's weight."""
    count = int(silent.sum())
    if not count:
        return p.new_zeros(())
    k = min(W_dec.shape[1] // 2, count)
    top = torch.where(silent, p, -1.0).topk(k, dim=1)
    own = torch.zeros_like(p).scatter(1, top.indices, top.values.clamp_min(0))
    return (left - own @ W_dec).square().sum(1).mean() / 32


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Decoder rows of length 1: a feature's activation is then the length of what it writes."""
    norm = dictionary.W_dec.norm(dim=1)
    assert dictionary.threshold is not None
    return replace(dictionary, W_enc=dictionary.W_enc * norm, b_enc=dictionary.b_enc * norm,
                   W_dec=dictionary.W_dec / norm[:, None], threshold=dictionary.threshold * norm)  # fmt: skip


def quality(
    model: Model, dictionary: Dictionary, mean: Tensor, samples: list[tuple[list[int], int]]
) -> dict[str, object]:
    """What is recorded in cfg.json: figures on held-out sequences, with 95 % intervals over them."""
    ids = [row for row, _ in samples]
    assert dictionary.site is not None
    site = model.site(dictionary.site)
    rows, owner = states(model, ids, site.layer)
    a = dictionary.encode(rows)
    n = torch.bincount(owner, minlength=len(ids)).double()

    def by_sequence(values: Tensor) -> Tensor:
        return torch.zeros(len(ids), dtype=torch.float64).index_add_(0, owner, values.double())

    left, there = (rows - dictionary.decode(a)).square().sum(1), (rows - rows.mean(0)).square().sum(1)
    explained = ratio_interval(by_sequence(there) - by_sequence(left), by_sequence(there))
    fires = (a > 0).any(0)
    scores = _spliced(model, dictionary, mean, samples)
    top, plain, spliced = scores["mean"].loss, scores["untouched"].loss, scores["spliced"].loss
    recovered = ratio_interval(top - spliced, top - plain)
    predicted = Sequences(tuple(map(tuple, ids)), 0, tuple(s for _, s in samples)).predicted
    loss = {name: ratio_interval(found.loss, predicted) for name, found in scores.items()}

    def told(found: Interval) -> dict[str, float]:
        return {key: round(value, 6) for key, value in found.as_dict().items()}

    return {
        "tokens": len(rows),
        "sequences": len(ids),
        "variance_explained": told(explained),
        "l0": told(ratio_interval(by_sequence((a > 0).sum(1)), n)),
        "dead_share": told(wilson(int((~fires).sum()), len(fires))),
        "loss_recovered": told(recovered),
        "loss": {name: told(found) for name, found in loss.items()},
    }


def _spliced(
    model: Model, dictionary: Dictionary, mean: Tensor, samples: list[tuple[list[int], int]]
) -> dict[str, Scores]:
    """Losses of the answers and stories with the site's rows reconstructed, and with their mean in their place."""
    sequences = Sequences(tuple(tuple(row) for row, _ in samples), 0, tuple(start for _, start in samples))
    assert dictionary.site is not None
    site, chosen = model.site(dictionary.site), choose(model, sequences, "all")
    arms = {"spliced": lambda x, h: dictionary(h), "mean": constant(mean)}
    runs = {name: run_arm(model, site, site, arm, chosen) for name, arm in arms.items()}
    return score(model, sequences, runs, batch_size=64)


def build(layer: int, models: Path, out: Path, recipe: Recipe | None = None) -> None:
    """Trains, measures and saves the dictionary of one layer of the recipient."""
    torch.set_num_threads(1)
    recipe = recipe or Recipe(layer)
    model = load(str(models / "recipient"))
    rng, other = random.Random(recipe.seed), random.Random(recipe.seed + 1)
    samples: list[list[int]] = []
    while sum(map(len, samples)) < TOKENS:
        samples.append(encode(model.tokenizer, draw_training(rng))[0])
    rows, _ = states(model, samples, layer)
    dictionary = unit_decoder(train(rows, recipe, log=lambda line: print(line, flush=True)))
    held_out = [encode(model.tokenizer, held_out_sample(other)) for _ in range(HELD_OUT)]
    folder = out / f"recipient.{dictionary.site}"
    dictionary.to(torch.float16).save(folder, overwrite=True)
    # what is measured is what a reader gets: halves, loaded back
    found = quality(model, Dictionary.load(folder), rows.mean(0), held_out)
    meta = {
        "quality": found, "recipe": asdict(recipe), "training_tokens": len(rows),
        "model_fingerprint": model.fingerprint_id, "special_tokens": "left out",
    }  # fmt: skip
    replace(dictionary.to(torch.float16), meta=meta).save(folder, overwrite=True)
    print(folder.name, {k: v for k, v in found.items() if k != "loss"}, flush=True)
