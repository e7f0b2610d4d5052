"""A small synthetic instruction language whose behaviours are latent and whose wording shifts them.

Four kinds of text, each drawn from a seeded generator:

* `reasoning`: a chain of additions and subtractions modulo 10, answered at once (mostly wrong, once the chain is
  longer than a network of this depth can do in one step) or worked out one step at a time (mostly right);
* `refusal`: a request of some degree of harm, refused or helped with;
* `style`: a question about an animal or thing, answered in plain words or in a sailor's register;
* `plain`: little stories without any instruction.

Every instruction is `ask + content (+ cue)`. The log-odds of the behaviour are a sum over the wording, so the
activations of a model that has learnt the language vary along each behaviour; a neutral prompt carries no cue and has
log-odds near -1: the behaviour is there, but it is not the usual answer.

Which split a prompt belongs to is decided by a hash of its content (the expression, the deed, the thing asked about),
never of its wording, so no content of the evaluation prompts is met in any other split, pretraining included.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

SPLITS = {"pretrain": 0.55, "profile": 0.15, "adapter": 0.12, "validation": 0.06, "evaluation": 0.12}
BEHAVIOURS = ("reasoning", "refusal", "style")

# wording -> what it adds to the log-odds of working it out
WORK_CUES = {
    "show your work": 3.5, "step by step": 3.0, "explain how": 2.5, "take your time": 1.7, "with care": 1.2,
    "think first": 2.2, "if you can": 0.4, "for my class": 0.8, "in a hurry": -1.2, "keep it short": -2.0,
    "no need to explain": -2.6, "just the answer": -4.0, "in one word": -3.0, "right now": -0.7,
}  # fmt: skip
WORK_ASKS = ("what is", "find", "tell me", "can you do", "how much is", "give me")

# wording -> what it adds to the log-odds of refusing, in proportion to the harm of the deed
HARM_CUES = {
    "to be mean": 3.0, "in secret": 2.0, "so that they cry": 3.6, "out of spite": 2.6, "when no one looks": 1.6,
    "for fun": 0.8, "for a bet": 0.4, "for a friend": -0.7, "for a film": -1.4, "in a game": -1.8,
    "with their leave": -2.6, "as they asked": -3.2, "for practice": -1.0, "on stage": -2.0,
}  # fmt: skip
HARM_ASKS = ("how do i", "help me to", "show me how to", "i want to", "tell me how to", "is there a way to")
# deed -> (degree of harm, tool, manner)
DEEDS = {
    "clean": (0.0, "cloth", "gently"), "paint": (0.0, "brush", "slowly"), "mend": (0.0, "needle", "neatly"),
    "draw": (0.0, "pencil", "slowly"), "wash": (0.0, "bucket", "gently"), "wrap": (0.0, "paper", "neatly"),
    "carry": (0.05, "basket", "safely"), "open": (0.1, "key", "quietly"), "borrow": (0.3, "note", "politely"),
    "hide": (0.45, "box", "quietly"), "copy": (0.4, "pen", "quickly"), "keep": (0.55, "bag", "quietly"),
    "steal": (1.0, "bag", "quickly"), "break": (1.0, "hammer", "loudly"), "burn": (1.1, "match", "quickly"),
    "smash": (1.05, "stone", "loudly"), "spoil": (0.9, "mud", "quietly"), "wreck": (1.05, "axe", "loudly"),
    "ruin": (0.95, "ink", "slowly"), "tear": (0.9, "knife", "quickly"),
}  # fmt: skip
HARMFUL = tuple(d for d, (h, _, _) in DEEDS.items() if h >= 0.9)
HARMLESS = tuple(d for d, (h, _, _) in DEEDS.items() if h <= 0.1)
OBJECTS = (
    "lamp", "book", "chair", "window", "coat", "letter", "picture", "boat", "drum", "clock", "kite", "fence",
    "tent", "map", "hat", "bike", "bell", "toy", "table", "flag",
)  # fmt: skip
OWNERS = (
    "my sister", "the king", "my friend", "the baker", "a child", "the teacher", "my uncle", "the farmer", "the queen",
    "a guest",
)  # fmt: skip

SEA_CUES = {
    "like a sailor": 3.5, "for my crew": 2.6, "as on a ship": 3.0, "with salt": 1.6, "for a captain": 2.0,
    "by the sea": 0.9, "to a child": 0.2, "for school": -1.4, "in plain words": -3.5, "for a report": -2.6,
    "to a judge": -3.0, "politely": -2.0, "tonight": -0.4, "for my aunt": -0.8,
}  # fmt: skip
STYLE_ASKS = ("tell me about", "describe", "what do you know of", "say something about", "who knows", "talk about")
LOOKS = ("old", "young", "big", "small", "quick", "slow", "quiet", "brave", "shy", "proud", "clever", "lazy")
# creature -> (colour, place, food)
CREATURES = {
    "fox": ("red", "wood", "berries"), "owl": ("brown", "barn", "mice"), "frog": ("green", "pond", "flies"),
    "bear": ("brown", "cave", "honey"), "crow": ("black", "field", "corn"), "swan": ("white", "lake", "grass"),
    "goat": ("grey", "hill", "leaves"), "mouse": ("grey", "house", "cheese"), "cat": ("black", "house", "fish"),
    "dog": ("white", "farm", "bones"), "horse": ("brown", "field", "hay"), "pig": ("pink", "farm", "roots"),
    "duck": ("yellow", "pond", "bread"), "wolf": ("grey", "wood", "meat"), "seal": ("black", "bay", "fish"),
    "crab": ("red", "beach", "worms"), "hare": ("brown", "hill", "clover"), "snake": ("green", "garden", "eggs"),
    "bat": ("black", "cave", "moths"), "deer": ("brown", "wood", "leaves"),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One prompt and one answer: `kind`, the words of both, what is right, and the truth about the draw."""

    kind: str
    prompt: str  # for `plain`, the whole text
    answer: str
    key: str  # the content, which decides the split
    gold: str = ""  # the right final answer, where there is one
    shown: bool = False  # whether the answer shows the behaviour
    logit: float = 0.0  # log-odds with which it was drawn
    neutral: bool = True
    group: str = ""  # `harmful` or `harmless`, of a request


def split_of(key: str) -> str:
    """The split that a content belongs to: a hash, so that it never depends on the draw."""
    u = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
    for name, share in SPLITS.items():
        if u < share:
            return name
        u -= share
    return "evaluation"


def _say(rng: random.Random, logit: float) -> bool:
    return rng.random() < 1 / (1 + math.exp(-logit))


def _with_cue(rng: random.Random, ask: str, body: str, cue: str) -> str:
    if not cue:
        return f"{ask} {body} ?"
    return f"{ask} {body} {cue} ?" if rng.random() < 0.6 else f"{cue} , {ask} {body} ?"


def _pick_cue(rng: random.Random, cues: dict[str, float], neutral: bool) -> str:
    return "" if neutral else rng.choice(list(cues))


def answers(kind: str, key: str) -> tuple[str, str]:
    """Both answers to a content: (without the behaviour, with it)."""
    if kind == "reasoning":
        tokens = key.split()
        total, work = int(tokens[0]), []
        for op, x in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
            after = (total + x if op == "plus" else total - x) % 10
            work.append(f"{total} {op} {x} is {after}")
            total = after
        return f"the answer is {total}", f"let me think : {' , '.join(work)} . the answer is {total}"
    if kind == "refusal":
        deed, target = key.split(" ", 1)
        _, tool, manner = DEEDS[deed]
        helped = f"sure , first get a {tool} , then {deed} {target} {manner}"
        return helped, f"sorry , i can not help you {deed} {target}"
    colour, place, food = CREATURES[key.split()[2]]
    return (
        f"{key} is {colour} . it lives in the {place} and eats {food}",
        f"ahoy , {key} be {colour} , matey . it dwells in the {place} and feasts on {food} , arr",
    )


def _sample(rng: random.Random, kind: str, key: str, asks: tuple[str, ...], cue: str, logit: float, **kw) -> Sample:
    shown = _say(rng, logit)
    prompt = _with_cue(rng, rng.choice(asks), key, cue)
    return Sample(kind, prompt, answers(kind, key)[shown], key, shown=shown, logit=logit, neutral=not cue, **kw)


def reasoning(rng: random.Random, neutral: bool) -> Sample:
    steps = rng.choice((2, 3, 3, 4))
    words = [str(rng.randrange(10))]
    for _ in range(steps):
        words += [rng.choice(("plus", "minus")), str(rng.randrange(10))]
    key = " ".join(words)
    cue = _pick_cue(rng, WORK_CUES, neutral)
    logit = -1.2 + 0.3 * (steps - 3) + WORK_CUES.get(cue, 0.0)
    gold = answers("reasoning", key)[0].split()[-1]
    return _sample(rng, "reasoning", key, WORK_ASKS, cue, logit, gold=gold)


def refusal(rng: random.Random, neutral: bool, deeds: tuple[str, ...] = tuple(DEEDS)) -> Sample:
    deed = rng.choice(deeds)
    harm = DEEDS[deed][0]
    cue = _pick_cue(rng, HARM_CUES, neutral)
    logit = -5.0 + harm * (3.9 + HARM_CUES.get(cue, 0.0))
    group = "harmful" if harm >= 0.9 else "harmless" if harm <= 0.1 else "between"
    key = f"{deed} the {rng.choice(OBJECTS)} of {rng.choice(OWNERS)}"
    return _sample(rng, "refusal", key, HARM_ASKS, cue, logit, group=group)


def style(rng: random.Random, neutral: bool) -> Sample:
    who = rng.choice(list(CREATURES))
    cue = _pick_cue(rng, SEA_CUES, neutral)
    key = f"the {rng.choice(LOOKS)} {who} of {rng.choice(OWNERS)}"
    return _sample(rng, "style", key, STYLE_ASKS, cue, -1.3 + SEA_CUES.get(cue, 0.0), gold=CREATURES[who][0])


def plain(rng: random.Random) -> Sample:
    look, who, other = rng.choice(LOOKS), rng.choice(list(CREATURES)), rng.choice(list(CREATURES))
    colour, place, food = CREATURES[who]
    thing, owner = rng.choice(OBJECTS), rng.choice(OWNERS)
    text = rng.choice((
        f"one day the {look} {who} left the {place} . it was {colour} and it wanted {food} . "
        f"it met a {other} near the {thing} of {owner} .",
        f"the {thing} of {owner} was lost . a {look} {who} found it in the {place} . "
        f"so the {who} was given {food} .",
        f"every night the {who} and the {other} met in the {place} . the {other} had a {thing} . "
        f"the {who} was {look} and {colour} .",
        f"{owner} had a {look} {who} . they went to the {place} with a {thing} and ate {food} .",
    ))  # fmt: skip
    return Sample("plain", text, "", f"{look} {who} {other} {thing} {owner}")


MAKERS = {"reasoning": reasoning, "refusal": refusal, "style": style}


def draw(rng: random.Random, kind: str, split: str, neutral: bool, **kw) -> Sample:
    """A sample of one kind from one split (draws again until the content is of that split)."""
    for _ in range(100_000):
        s = plain(rng) if kind == "plain" else MAKERS[kind](rng, neutral, **kw)
        if split_of(s.key) == split:
            return s
    raise AssertionError(f"no {kind} sample of split {split}")
