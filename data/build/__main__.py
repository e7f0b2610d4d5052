"""`python -m data.build [prompts] [models] [adapters]`: makes what is bundled again; everything unless told which.

Models take about twenty minutes on a core each and are trained side by side. The same seeds on the same machine and
versions give the same files; another machine's arithmetic gives other weights of the same behaviour.
"""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
PARTS = ("prompts", "models", "adapters")


def _train(name: str) -> None:
    import torch

    from .train import RECIPES, train

    torch.set_num_threads(1)
    train(RECIPES[name], DATA / "models" / name, log=lambda line: print(line, flush=True))


def _adapters() -> None:
    """The donor's adapters, by the recipe that a job uses where it is given none."""

    from workbench import load
    from workbench.adapters.train import default_layer, train_adapter
    from workbench.jobs import TrainingTable
    from workbench.profile import profile_model

    from .language import BEHAVIOURS

    donor = load(str(DATA / "models" / "donor"))
    donor.name = "bundled:donor"
    site = donor.site(default_layer(donor))
    store = profile_model(donor, DATA / "prompts" / "profile.jsonl", sites=[site])
    recipe = TrainingTable().model_dump(exclude={"layers"})
    for name in BEHAVIOURS:
        demonstrations = DATA / "prompts" / f"demonstrations_{name}.jsonl"
        trained = train_adapter(donor, demonstrations, site, profile=store, name=name, **recipe)
        trained.adapter.save(DATA / "adapters" / name, overwrite=True)
        print(
            f"{name}: loss {trained.curve[0][1]:.3f} -> {trained.curve[-1][1]:.3f}, size {trained.curve[-1][2]:.2f} spreads"
        )


def main(parts: list[str]) -> None:
    unknown = set(parts) - set(PARTS)
    if unknown:
        sys.exit(f"unknown part {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    from .prompts import build
    from .train import RECIPES

    chosen = parts or list(PARTS)
    if "prompts" in chosen:
        build(DATA / "prompts")
    if "models" in chosen:
        with get_context("spawn").Pool(len(RECIPES)) as pool:
            pool.map(_train, RECIPES)
    if "adapters" in chosen:
        _adapters()


if __name__ == "__main__":
    main(sys.argv[1:])
