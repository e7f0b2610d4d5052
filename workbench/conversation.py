"""A conversation with a model, turn by turn, under an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .generation import Decoding
from .prompts import Prompt, encode

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.blend import Blend
    from .models import Model


def room_of(model: Model) -> int:
    """How long an answer may be unless that is said: 256 tokens, and half of a context that is smaller than 512."""
    return min(256, model.max_length // 2)


class Conversation:
    """What was said so far, and what a model answers to the next line.

    Where the tokenizer has a chat template every turn is kept, and when they no longer fit into the model's context the
    oldest go; without one each line is a prompt of its own. An adapter for the last prompt token edits the last token
    before each answer. A sampled answer depends on the seed and on the number of the turn.

    Attributes: `messages`, those that the next answer will see; `turns`, how many were answered; `forgotten`, how many
    turns were left out for lack of room.

    >>> talk = Conversation(model, adapter, system="Answer in one word.")  # doctest: +SKIP
    >>> talk.say("What is 7 plus 8?", on_text=sys.stdout.write)            # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter | Blend | None = None,
        *,
        system: str | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.decoding = decoding or Decoding(room_of(model))
        self.remembers = bool(getattr(model.tokenizer, "chat_template", None))
        if system is not None and not self.remembers:
            raise UserError(
                f"{model.name} has no chat template, so there is no place for a system prompt; leave it out"
            )
        self._head: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[dict[str, Any]] = []
        self.turns = self.forgotten = 0

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [*self._head, *self._said]

    def reset(self) -> None:
        """Begins anew, with the system prompt alone."""
        self._said.clear()
        self.turns = self.forgotten = 0

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer to `text`, white space around it left out; `on_text` is called with its pieces as they come.

        An answer that is broken off by an exception is not kept, nor is the line that it was to. Raises UserError for an
        empty text, and for one that does not fit into the model's context by itself.
        """
        if not text.strip():
            raise UserError("there is nothing to answer: the line is empty")
        said = [*self._said, {"role": "user", "content": text}]
        dropped = 0
        while self.remembers and self._length(said) > self._room:
            if len(said) == 1:
                raise UserError(f"this line takes {self._length(said)} tokens and there is room for {self._room}; say it in "
                                "fewer words, or lower max_new_tokens")  # fmt: skip
            said, dropped = said[2:], dropped + 1
        options = replace(self.decoding, seed=self.decoding.seed + self.turns).options
        answer = self.model.generate([self._prompt(said)], adapter=self.adapter, on_text=on_text, **options)[0].strip()
        self._said = [*said, {"role": "assistant", "content": answer}] if self.remembers else []
        self.turns, self.forgotten = self.turns + 1, self.forgotten + dropped
        return answer

    @property
    def _room(self) -> int:
        return self.model.max_length - self.decoding.max_new_tokens

    def _prompt(self, said: list[dict[str, Any]]) -> Prompt:
        return Prompt(tuple([*self._head, *said]), None, str(self.turns))

    def _length(self, said: list[dict[str, Any]]) -> int:
        return len(encode([self._prompt(said)], self.model.tokenizer)[0])
