"""`python -m data.build [prompts] [models] [adapters] [dictionaries]`: makes what is bundled again; all unless told which.

The name of a model (donor, recipient, outsider) makes that one alone. Models take about twenty minutes on a core each,
dictionaries five, and are trained side by side. The same seeds on the same machine and versions give the same files;
another machine's arithmetic gives other weights of the same behaviour.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
PARTS = ("prompts", "models", "adapters", "dictionaries")


def _models(names: Sequence[str]) -> None:
    """These models side by side, a process and a thread each."""
    from .train import train_one

    spawn = get_context("spawn")
    running = [spawn.Process(target=train_one, args=(name, DATA / "models" / name)) for name in names]
    for process in running:
        process.start()
    for process in running:
        process.join()
    failed = [name for name, process in zip(names, running, strict=True) if process.exitcode]
    if failed:
        sys.exit(f"training failed: {', '.join(failed)}")


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


def _dictionaries() -> None:
    """A dictionary of each of the recipient's later layers, two at a time, a process and a thread each."""
    from .dictionaries import LAYERS, build

    with get_context("spawn").Pool(2) as pool:
        pool.starmap(build, [(layer, DATA / "models", DATA / "dictionaries") for layer in LAYERS], chunksize=1)


def main(parts: list[str]) -> None:
    from .train import RECIPES

    unknown = set(parts) - {*PARTS, *RECIPES}
    if unknown:
        sys.exit(f"unknown part {', '.join(sorted(unknown))}; allowed: {', '.join((*PARTS, *RECIPES))}")
    from .prompts import build

    chosen = parts or list(PARTS)
    if "prompts" in chosen:
        build(DATA / "prompts")
    if models := [name for name in RECIPES if name in chosen or "models" in chosen]:
        _models(models)
    if "adapters" in chosen:
        _adapters()
    if "dictionaries" in chosen:
        _dictionaries()


if __name__ == "__main__":
    main(sys.argv[1:])
