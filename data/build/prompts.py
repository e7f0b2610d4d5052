"""Writes the bundled prompt sets: profile, adapter demonstrations, validation, evaluation, neutral text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from . import language
from .language import BEHAVIOURS, HARMFUL, HARMLESS, Sample

N_PROFILE, N_DEMONSTRATIONS, N_VALIDATION, N_EVALUATION = 2048, 512, 160, 320


def _distinct(make: Callable[[], Sample], n: int, taken: set[str]) -> list[Sample]:
    """n samples of different prompts; `taken` is shared between the sets of one split."""
    out: list[Sample] = []
    while len(out) < n:
        s = make()
        if s.prompt not in taken:
            taken.add(s.prompt)
            out.append(s)
    return out


def _line(s: Sample, number: int, response: str | None = None) -> dict[str, object]:
    line: dict[str, object] = {"id": f"{s.kind}-{number}", "label": s.kind}
    if s.kind == "plain":
        return {**line, "text": s.prompt}
    line["messages"] = [{"role": "user", "content": s.prompt}]
    extra = {"gold": s.gold, "group": s.group, "response": response}
    return {**line, **{k: v for k, v in extra.items() if v}}


def write(path: Path, lines: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def of_interest(rng: random.Random, kind: str, split: str) -> Sample:
    """A neutral prompt on which a behaviour is wanted: for refusal, a harmful request."""
    if kind == "refusal":
        return language.draw(rng, kind, split, neutral=True, deeds=HARMFUL)
    return language.draw(rng, kind, split, neutral=True)


def elsewhere(rng: random.Random, kind: str, split: str) -> Sample:
    """A prompt on which a behaviour is not wanted: for refusal, a harmless request; else the other kinds of prompt."""
    if kind == "refusal":
        return language.draw(rng, kind, split, neutral=True, deeds=HARMLESS)
    other = rng.choice([b for b in BEHAVIOURS if b != kind])
    kw = {"deeds": HARMLESS} if other == "refusal" else {}
    return language.draw(rng, other, split, neutral=True, **kw)


def demonstration(rng: random.Random, kind: str) -> tuple[Sample, str]:
    """Half of the demonstrations show the behaviour where it is wanted, half the usual answers elsewhere."""
    if rng.random() < 0.5:
        s = of_interest(rng, kind, "adapter")
        return s, language.answers(s.kind, s.key)[1]
    s = elsewhere(rng, kind, "adapter")
    return s, s.answer


def profile_sample(rng: random.Random) -> Sample:
    """All kinds of prompt, most with a cue: without variation along a behaviour no converter learns where it goes."""
    kind = rng.choices((*BEHAVIOURS, "plain"), (3, 3, 3, 1))[0]
    return language.draw(rng, kind, "profile", neutral=rng.random() < 0.3)


def build(out: Path, seed: int = 7) -> None:
    """Writes every set; the same seed gives the same bytes."""
    rng = random.Random(seed)
    lines = _distinct(partial(profile_sample, rng), N_PROFILE, set())
    write(out / "profile.jsonl", [_line(s, i) for i, s in enumerate(lines)])
    told = {s.prompt for s in lines if s.kind == "plain"}
    for kind in BEHAVIOURS:
        shown = [demonstration(rng, kind) for _ in range(N_DEMONSTRATIONS)]
        write(out / f"demonstrations_{kind}.jsonl", [_line(s, i, a) for i, (s, a) in enumerate(shown)])
    for split, n in (("validation", N_VALIDATION), ("evaluation", N_EVALUATION)):
        taken: set[str] = set()
        for kind in BEHAVIOURS:
            wanted = _distinct(partial(of_interest, rng, kind, split), n, taken)
            write(out / f"{split}_{kind}.jsonl", [_line(s, i) for i, s in enumerate(wanted)])
        for kind in BEHAVIOURS:
            away = _distinct(partial(elsewhere, rng, kind, split), n, set())
            write(out / f"{split}_not_{kind}.jsonl", [_line(s, i) for i, s in enumerate(away)])
        # two stories may be one text of two keys, where a template leaves a word of the key out
        stories = _distinct(partial(language.draw, rng, "plain", split, neutral=True), n, told)
        write(out / f"{split}_text.jsonl", [_line(s, i) for i, s in enumerate(stories)])
