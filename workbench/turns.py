"""Where the messages of a chat lie in the text that a template made of them, without asking the template's author.

A template strips contents, moves the system prompt, writes its own markers, which may look like contents. So the frame
(the template's own text) is found first, by rendering stand-ins in place of the contents; what lies between the pieces
of the frame is the contents. Where no tokenizer is at hand, the frame is learned from other prompts, or guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .prompts import Prompt

Span = tuple[int, int]
ENOUGH = 256  # prompts, to know a frame by
NAMES = {"assistant": ("assistant", "model", "bot", "gpt"), "user": ("user", "human"), "system": ("system",)}
"""what templates call a role in the marker that stands before its content"""


@dataclass(frozen=True)
class Frame:
    """The template's own text of chats with certain roles: `pieces[0] content pieces[1] content ... pieces[-1]`.

    order: which message (a number) stands in each gap; templates may move a system prompt.

    >>> Frame(("<user>", "<assistant>"), (0,)).locate(["user"], "<user>user<assistant>")
    [(6, 10)]
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]

    def locate(self, contents: Sequence[str], text: str) -> list[Span] | None:
        """The characters [start, end) of each content in `text`; None where the text is not in this frame.

        A content may have lost the white space around it, or be cut to a part of it (templates drop old reasoning).
        """
        if not text.startswith(self.pieces[0]):
            return None
        found: dict[int, Span] = {}
        at = len(self.pieces[0])
        for gap, message in enumerate(self.order, 1):
            piece, last = self.pieces[gap], gap == len(self.order)
            end = _content_end(contents[message], text, at, piece, last)
            if end is None:
                return None
            found[message] = (at, end)
            at = end + len(piece)
        return [found[i] for i in range(len(contents))] if len(found) == len(contents) else None


def _content_end(content: str, text: str, at: int, piece: str, last: bool) -> int | None:
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        end = at + len(form)
        follows = end + len(piece) == len(text) and text.endswith(piece) if last else text.startswith(piece, end)
        if follows and text.startswith(form, at):
            return end
    end = len(text) - len(piece) if last else text.find(piece, at)
    fits = end >= at and text.startswith(piece, end) and bool(piece or last)
    return end if fits and text[at:end].strip() and text[at:end] in content else None


def stand_ins(prompt: Prompt) -> tuple[Prompt, list[str]]:
    """The chat with a word that occurs nowhere in place of each content, and those words."""
    words = [f"QZ7X{i}X7ZQ" for i in range(len(prompt.messages or ()))]
    pairs = zip(prompt.messages or (), words, strict=True)
    return replace(prompt, messages=tuple({**m, "content": _like(m["content"], word)} for m, word in pairs)), words


def _like(content: Any, word: str) -> Any:
    return word if isinstance(content, str) else [{"type": "text", "text": word}]


def frame_of(text: str, words: Sequence[str]) -> Frame | None:
    """The frame of a text that was rendered from `stand_ins`; None where a word is missing or written twice."""
    if any(text.count(word) != 1 for word in words):
        return None
    order = sorted(range(len(words)), key=lambda i: text.index(words[i]))
    pieces, at = [], 0
    for i in order:
        pieces.append(text[at : text.index(words[i])])
        at = text.index(words[i]) + len(words[i])
    return Frame((*pieces, text[at:]), tuple(order))


class Frames:
    """Frames learned from rendered prompts alone: of each sequence of roles, the one that most prompts are in."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], Counter[Frame]] = {}

    def learn(self, prompt: Prompt, text: str) -> None:
        """Takes one prompt into account; of those with equal roles, the first few hundred."""
        seen = self._seen.setdefault(roles_of(prompt), Counter())
        if seen.total() >= ENOUGH:
            return
        found = _guess(prompt, text) if prompt.messages else []
        if not found or None in found:
            return
        spans = [span for span in found if span is not None]
        order = sorted(range(len(spans)), key=lambda i: spans[i])
        edges = [0, *(edge for i in order for edge in spans[i]), len(text)]
        frame = Frame(tuple(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)), tuple(order))
        seen[frame] += 1

    def get(self, prompt: Prompt) -> Frame | None:
        """The frame of prompts with these roles, or None where none was seen."""
        seen = self._seen.get(roles_of(prompt))
        return seen.most_common(1)[0][0] if seen else None


def roles_of(prompt: Prompt) -> tuple[str, ...]:
    """The roles of a chat's messages, in order; none of a plain text."""
    return tuple(str(m["role"]) for m in prompt.messages or ())


def content_text(message: dict[str, Any]) -> str:
    """The text of a message's content: the string, or its text parts one after another."""
    content = message["content"]
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def find_turns(prompt: Prompt, text: str, frame: Frame | None = None) -> list[Span | None]:
    """The characters of each message's content in the rendered text, in the order of the messages; None: not there."""
    if prompt.messages is None:
        return []
    contents = [content_text(m) for m in prompt.messages]
    exact = frame.locate(contents, text) if frame is not None and len(frame.order) == len(contents) else None
    return list(exact) if exact is not None else _guess(prompt, text)


def turn_spans(prompt: Prompt, text: str, frame: Frame | None = None) -> list[tuple[str, int, int]]:
    """(role, start, end) of each message: the characters [start, end) of its content in the rendered text.

    In the order of the messages, whatever order the template writes them in; white space that the template strips is
    left out. A plain text has no turns: []. frame: the template's own text, as `Encoded.frame` holds it; without it,
    contents are searched for in order, after the name of their role, and one that looks like a marker may be mistaken.
    Raises UserError where a content is not in the text.

    >>> from workbench.prompts import PromptSet
    >>> turn_spans(PromptSet.load(["user"])[0], "<user>user<assistant>")
    [('user', 6, 10)]
    """
    spans = []
    for number, (role, span) in enumerate(zip(roles_of(prompt), find_turns(prompt, text, frame), strict=True)):
        if span is None:
            raise missing_turn(prompt, number)
        spans.append((role, *span))
    return spans


def missing_turn(prompt: Prompt, number: int) -> UserError:
    """The error for a message that the rendered text does not hold."""
    return UserError(f"prompt {prompt.id!r}: message {number} ({roles_of(prompt)[number]}) is not in the rendered text as "
                     "given: the chat template drops or rewrites it; choose tokens last or all")  # fmt: skip


def _guess(prompt: Prompt, text: str) -> list[Span | None]:
    """Contents one after another; each where the name of its role comes before it, if that leaves room for the rest."""
    messages = list(prompt.messages or ())
    contents = [content_text(m).strip() for m in messages]
    if len(messages) == 1 and text.strip() == contents[0]:  # no template
        start = text.find(contents[0])
        return [(start, start + len(contents[0]))]
    found: list[Span | None] = []
    at = 0
    for i, (message, content) in enumerate(zip(messages, contents, strict=True)):
        start = _start(str(message["role"]), content, contents[i + 1 :], text, at)
        if start < 0:
            whole = text.find(content)  # moved by the template; taken only where there is no doubt
            sure = whole >= 0 and text.find(content, whole + 1) < 0
            found.append((whole, whole + len(content)) if sure else None)
            continue
        at = start + len(content)
        found.append((start, at))
    return found


def _start(role: str, content: str, rest: Sequence[str], text: str, at: int) -> int:
    first = start = text.find(content, at)
    for _ in range(64):  # a content of one letter is everywhere
        if start < 0:
            break
        before = text[at:start].lower()
        if any(name in before for name in NAMES.get(role, (role,))):
            return start if _fits(rest, text, start + len(content)) or not _fits(rest, text, first) else first
        start = text.find(content, start + 1)
    return first


def _fits(contents: Sequence[str], text: str, at: int) -> bool:
    for content in contents:
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True
