"""The tokens of a prompt set in flat files without a name: read again block by block, so that memory stays flat."""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..rendering import Encoded

Numbers = NDArray[np.integer]


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        try:
            folder = tempfile.gettempdir()
        except OSError:  # there is none that can be written
            folder = "the folder for temporary files"
        raise UserError(f"cannot write the prompts' tokens to {folder}: {err.strerror or err}; make room there, or set "
                        "TMPDIR to a folder that has some") from err  # fmt: skip


def _close(stream: IO[bytes]) -> None:
    with suppress(OSError):  # what is left in the buffer is of no use any more
        stream.close()


class Column:
    """Numbers of one kind, appended to a file without a name (it goes with the process) and read back by ranges.

    The file lies in the folder for temporary files: set TMPDIR where that is held in memory.

    >>> column = Column("int32")
    >>> column.append(np.array([5, 6, 7]))
    >>> column.read(1, 3).tolist(), column.n
    ([6, 7], 3)
    """

    def __init__(self, dtype: str) -> None:
        self.dtype, self.n = np.dtype(dtype), 0
        self._digest = hashlib.sha256()
        with _room():
            self._stream = tempfile.TemporaryFile(prefix="workbench-", buffering=1 << 20)  # noqa: SIM115 (closed below)
        self._dirty = False
        weakref.finalize(self, _close, self._stream)

    def append(self, values: Numbers) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        with _room():
            self._stream.write(data)
        self._digest.update(data)
        self.n += len(data) // self.dtype.itemsize
        self._dirty = True

    def read(self, start: int, stop: int) -> Numbers:
        if self._dirty:
            with _room():
                self._stream.flush()
            self._dirty = False
        size = self.dtype.itemsize
        # not a memory map: its pages would count as the process's own, more of them with each block
        return np.frombuffer(os.pread(self._stream.fileno(), (stop - start) * size, start * size), dtype=self.dtype)

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()


def windows(n: int, head: int, max_length: int, stride: int | None) -> list[tuple[int, int, int]]:
    """How a prompt of n tokens is run: (begin, new, end) of each window.

    A window reads the first `head` tokens (the BOS) and then [begin, end), at most `max_length` in all; its rows are
    those of [new, end): the tokens that no window before it has. Window k begins k * stride tokens after the first.

    >>> windows(10, 1, 6, 3)
    [(1, 0, 6), (4, 6, 9), (7, 9, 10)]
    """
    found = [(head, 0, n if stride is None else min(n, max_length))]
    while stride is not None and found[-1][2] < n:
        begin, _, end = found[-1]
        found.append((begin + stride, end, min(n, end + stride)))
    return found


class Spool:
    """What a plan knows of each prompt and of each sequence that is run: a prompt, or a window of a long one.

    Of each prompt there are in memory `n_ids`, `heads`, `cut` and where its tokens and its text begin; of each sequence
    `prompt`, `begin`, `new`, `end` (see `windows`), `first_row` and `n_rows`. Tokens, kept positions, their spans and
    the rendered texts are in files. `add` all prompts, then read.
    """

    def __init__(self) -> None:
        self._ids, self._positions, self._spans = Column("int32"), Column("int32"), Column("int32")
        self._text = Column("uint8")
        self._prompts = {name: array("q") for name in ("id_start", "n_ids", "head", "cut", "text_start", "row_start")}
        self._sequences = {name: array("q") for name in ("prompt", "begin", "new", "end", "first_row", "n_rows")}

    def add(self, one: Encoded, text: str, kept: list[int], head: int, cuts: list[tuple[int, int, int]]) -> None:
        """A prompt, the positions kept of it (ascending), and its windows."""
        number = self.n_prompts
        positions = np.array(kept, dtype=np.int32)
        for name, value in (("id_start", self._ids.n), ("n_ids", len(one.ids)), ("head", head), ("cut", one.cut),
                            ("text_start", self._text.n), ("row_start", self._positions.n)):  # fmt: skip
            self._prompts[name].append(value)
        for begin, new, end in cuts:
            low, high = np.searchsorted(positions, (new, end)).tolist()
            for name, value in (("prompt", number), ("begin", begin), ("new", new), ("end", end),
                                ("first_row", self._positions.n + low), ("n_rows", high - low)):  # fmt: skip
                self._sequences[name].append(value)
        self._ids.append(np.array(one.ids, dtype=np.int32))
        self._positions.append(positions)
        self._spans.append(np.array([one.spans[i] for i in kept], dtype=np.int32).reshape(-1))
        self._text.append(np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8))

    @property
    def n_prompts(self) -> int:
        return len(self._prompts["n_ids"])

    @property
    def n_rows(self) -> int:
        return self._positions.n

    @property
    def hash(self) -> str:
        """Of the tokens and of the positions kept."""
        return hashlib.sha256((self._ids.hash + self._positions.hash).encode()).hexdigest()

    @cached_property
    def prompts(self) -> dict[str, Numbers]:
        """One number for each prompt: id_start, n_ids, head, cut, text_start, row_start."""
        return {name: np.array(values, dtype=np.int64) for name, values in self._prompts.items()}

    @cached_property
    def sequences(self) -> dict[str, Numbers]:
        """One number for each sequence: prompt, begin, new, end, first_row, n_rows."""
        return {name: np.array(values, dtype=np.int64) for name, values in self._sequences.items()}

    @cached_property
    def lengths(self) -> Numbers:
        """The tokens of each sequence."""
        s = self.sequences
        return self.prompts["head"][s["prompt"]] + s["end"] - s["begin"]

    def ids(self, sequence: int) -> Numbers:
        """The tokens that a sequence reads, its head first."""
        begin, end = (int(self.sequences[name][sequence]) for name in ("begin", "end"))
        prompt = int(self.sequences["prompt"][sequence])
        start, head = (int(self.prompts[name][prompt]) for name in ("id_start", "head"))
        if begin == head:
            return self._ids.read(start, start + end)
        return np.concatenate([self._ids.read(start, start + head), self._ids.read(start + begin, start + end)])

    def columns(self, sequence: int) -> Numbers:
        """Where the kept tokens lie in the sequence."""
        first, n = (int(self.sequences[name][sequence]) for name in ("first_row", "n_rows"))
        prompt = int(self.sequences["prompt"][sequence])
        shift = int(self.prompts["head"][prompt] - self.sequences["begin"][sequence])
        return self._positions.read(first, first + n) + shift

    def rows(self, start: int, n: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Of rows [start, start + n): prompt, position, token id, and span [n, 2] in the prompt's rendered text."""
        position, row = self._positions.read(start, start + n), np.arange(start, start + n)
        prompt = np.searchsorted(self.prompts["row_start"], row, side="right") - 1
        parts = []
        for number in range(int(prompt[0]), int(prompt[-1]) + 1) if n else ():
            mine = position[np.searchsorted(prompt, number) : np.searchsorted(prompt, number, side="right")]
            if len(mine):
                start_id, first = int(self.prompts["id_start"][number]), int(mine[0])
                parts.append(self._ids.read(start_id + first, start_id + int(mine[-1]) + 1)[mine - first])
        token = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return prompt, position, token, self._spans.read(2 * start, 2 * (start + n)).reshape(-1, 2)

    def text(self, prompt: int) -> str:
        """The rendered text of a prompt."""
        starts = self.prompts["text_start"]
        stop = int(starts[prompt + 1]) if prompt + 1 < len(starts) else self._text.n
        return self._text.read(int(starts[prompt]), stop).tobytes().decode("utf-8", "surrogatepass")

    def prompt_ids(self, prompt: int) -> Numbers:
        """All tokens of a prompt."""
        start = int(self.prompts["id_start"][prompt])
        return self._ids.read(start, start + int(self.prompts["n_ids"][prompt]))
