"""The two tables of an open store: what each row is, and what each prompt was."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..hashes import json_list_hash
from ..parquet_files import check_rows
from .checks import MANIFEST, TABLES
from .folder import Folder

if TYPE_CHECKING:
    from ..prompts import Prompt, PromptSet

EXPANSION = 256  # no table of ours is packed tighter than this; a bomb is
SMALL = 256 << 20  # of bytes unpacked: always allowed, as two thousand copies of one long prompt are
PLAIN = ("text", "content")  # of prompts.parquet: a dictionary would pack copies of a long text as tight as a bomb


class Tables:
    """Reads rows.parquet and prompts.parquet; refuses one that holds other than what the manifest counts."""

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.counts = dict(zip(TABLES, (manifest["n_rows"], manifest["prompts"]["count"]), strict=True))
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()  # a reader of parquet is for one thread at a time

    def _damaged(self, name: str, why: object) -> UserError:
        return UserError(f"store {self.folder.path}: {name} is damaged ({str(why).splitlines()[0]:.120}); profile "
                         "again or restore it from a copy")  # fmt: skip

    def _bomb(self, name: str, unpacked: int) -> UserError:
        return UserError(f"store {self.folder.path}: {name} says that its {self.manifest['tables'][name]['bytes']} "
                         f"bytes unpack to {unpacked}, as only a zip bomb's do; refused")  # fmt: skip

    def _file(self, name: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if name in self._files:
            return self._files[name]
        size = self.manifest["tables"][name]["bytes"]
        stream = os.fdopen(self.folder.open(name, size), "rb")
        try:
            file = pq.ParquetFile(stream)
            check_rows(file.metadata)
            rows = file.metadata.num_rows
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
        except (pa.ArrowException, ValueError, OSError, KeyError, TypeError) as err:
            stream.close()
            raise self._damaged(name, err) from err
        if rows != self.counts[name]:
            raise UserError(f"store {self.folder.path}: {name} says that it holds {rows} lines, its {MANIFEST} says "
                            f"{self.counts[name]}; refused")  # fmt: skip
        if not 0 <= unpacked <= max(SMALL, EXPANSION * size):
            raise self._bomb(name, unpacked)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise self._damaged(name, "two of its columns have one name")
        strings = [field.name for field in file.schema_arrow if field.type == "string"]
        self._files[name] = pq.ParquetFile(stream, metadata=file.metadata, read_dictionary=strings)
        return self._files[name]

    def read(self, name: str, columns: list[str] | None = None, group: int | None = None) -> Any:
        """A table of pyarrow: these columns (all unless given) of a row group or of the whole."""
        import pyarrow as pa

        file = self._file(name)
        self._check_columns(name, columns)
        try:
            return self._spelt(name, file.read(columns) if group is None else file.read_row_group(group, columns))
        except UserError:
            raise
        except (pa.ArrowException, ValueError, OSError, KeyError, TypeError) as err:
            raise self._damaged(name, err) from err

    def take(self, name: str, lines: Any, columns: Sequence[str] | None = None) -> Any:
        """The lines of an index [n] (numbers within the table), in the order given, as one pyarrow table.

        Row groups without any of them are not read, and of the others the columns asked for, one group at a time.
        """
        import pyarrow as pa

        file, index = self._file(name), np.asarray(lines, dtype=np.int64)
        self._check_columns(name, columns)
        wanted, place = np.unique(index, return_inverse=True)
        ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)))
        cuts = np.searchsorted(wanted, [0, *ends])
        assert not len(wanted) or (wanted[0] >= 0 and wanted[-1] < self.counts[name])
        chosen = list(columns) if columns is not None else self.columns(name)
        try:
            with self._lock:
                parts = [file.read_row_group(group, chosen).select(chosen).take(wanted[low:high] - start)
                         for group, (start, low, high) in enumerate(zip([0, *ends], cuts, cuts[1:], strict=False))
                         if low < high] or [file.read_row_groups([], chosen)]  # fmt: skip
            return pa.concat_tables([self._spelt(name, part) for part in parts]).take(place)
        except UserError:
            raise
        except (pa.ArrowException, ValueError, OSError, KeyError, TypeError) as err:
            raise self._damaged(name, err) from err

    def columns(self, name: str) -> list[str]:
        """The names of a table's columns."""
        return list(self._file(name).schema_arrow.names)

    def _check_columns(self, name: str, columns: Sequence[str] | None) -> None:
        unknown = set(columns or ()) - set(self.columns(name))
        if unknown:
            raise UserError(f"store {self.folder.path}: {name} has no column {', '.join(sorted(unknown))}; it has "
                            f"{', '.join(self.columns(name))}")  # fmt: skip

    def batches(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        size: int = 16384,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[Any]:
        """Lines [start, stop) as pyarrow tables of at most `size` lines; row groups without any of them are not read."""
        import pyarrow as pa

        file = self._file(name)
        self._check_columns(name, columns)
        ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)))
        stop = self.counts[name] if stop is None else stop
        spans = list(enumerate(zip([0, *ends], ends, strict=False)))
        groups = [i for i, (low, high) in spans if low < stop and high > start]
        at = spans[groups[0]][1][0] if groups else 0
        try:
            for batch in file.iter_batches(size, row_groups=groups, columns=None if columns is None else list(columns)):
                low, high, at = max(start - at, 0), min(stop - at, len(batch)), at + len(batch)
                if low < high:
                    yield self._spelt(name, pa.Table.from_batches([batch.slice(low, high - low)]))
        except (pa.ArrowException, ValueError, OSError, KeyError, TypeError) as err:
            raise self._damaged(name, err) from err

    def _spelt(self, name: str, table: Any) -> Any:
        import pyarrow as pa

        for i, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):
                table = table.set_column(i, field.name, self._texts(name, table.column(i)))
        return table

    def _texts(self, name: str, column: Any) -> Any:
        """A column of strings that were read as numbers of distinct ones, one string for each line.

        A string that a few bytes of the file name a million times is a bomb; so its size is known before it is made.
        """
        import pyarrow.compute as pc

        size, total = self.manifest["tables"][name]["bytes"], 0
        for chunk in column.chunks:
            total += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        if total > max(SMALL, EXPANSION * size):
            raise self._bomb(name, total)
        return column.cast(column.type.value_type)

    def _prompt_column(self, group: int | None = None) -> np.ndarray:
        found = self.read(TABLES[0], ["prompt"], group)["prompt"].to_numpy()
        wrong = found.dtype.kind not in "iu" or (len(found) and not 0 <= found.min() <= found.max() < self.n_prompts)
        if wrong or (np.diff(found) < 0).any():
            raise self._damaged(TABLES[0], f"its prompts are not rising numbers from 0 to {self.n_prompts - 1}")
        return found.astype(np.int64, copy=False)

    @property
    def n_prompts(self) -> int:
        return int(self.manifest["prompts"]["count"])

    @cached_property
    def prompt_index(self) -> np.ndarray:
        """The prompt of each row."""
        return self._prompt_column()

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]] | None:
        """The first row, and the first and the last prompt, of each row group; None where the table does not say."""
        self._check_columns(TABLES[0], ["prompt"])
        meta = self._file(TABLES[0]).metadata
        column = next((i for i in range(meta.num_columns) if meta.schema.column(i).path == "prompt"), None)
        if column is None:  # a nested one, which has leaves of other names
            return None
        found, start = [], 0
        for i in range(meta.num_row_groups):
            statistics = meta.row_group(i).column(column).statistics
            if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                return None
            found.append((start, statistics.min, statistics.max))
            start += meta.row_group(i).num_rows
        return found

    def rows_of(self, prompt: int) -> range:
        """The rows of a prompt; only the part of the table that holds it is read."""
        if not 0 <= prompt < self.n_prompts:
            raise UserError(f"store {self.folder.path} has prompts 0 to {self.n_prompts - 1}; got {prompt}")
        if "prompt_index" in self.__dict__ or self._groups is None:
            low, high = np.searchsorted(self.prompt_index, [prompt, prompt + 1]).tolist()
            return range(low, high)
        low, high = 0, 0
        for group, (start, first, last) in enumerate(self._groups):
            if first <= prompt <= last:
                column = self._prompt_column(group)
                here = [start + int(np.searchsorted(column, p)) for p in (prompt, prompt + 1)]
                low, high = (here[0] if low == high else low), here[1]
        return range(low, high)

    def prompts(self) -> Iterator[Prompt]:
        """The prompts, one by one, as they were given; UserError where one cannot be read."""
        from ..prompts import Prompt

        if str(self.manifest["prompts"]["hash"]).startswith("unknown:"):
            raise UserError(f"store {self.folder.path}: the prompts of these rows are unknown: their source did not say "
                            "them; import it again with its prompts")  # fmt: skip
        for batch in self.batches(TABLES[1], ["id", "label", "meta", "content"]):
            for line in batch.to_pylist():
                try:
                    content = json.loads(line["content"])
                    chat = None if isinstance(content, str) else tuple(dict(message) for message in content)
                    text = content if isinstance(content, str) else None
                    found = Prompt(chat, text, line["id"], line["label"], json.loads(line["meta"] or "{}"))
                except (ValueError, TypeError, RecursionError) as err:
                    raise self._damaged(TABLES[1], err) from err
                yield found

    def prompt_set(self) -> PromptSet:
        """The prompts that were profiled, as they were given; UserError where they are not those of the manifest."""
        from ..prompts import PromptSet

        prompts = PromptSet(tuple(self.prompts()), str(self.manifest["prompts"]["name"]))
        self.check_prompts(prompts)
        return prompts

    def check_prompts(self, prompts: Iterable[Prompt] | None = None) -> None:
        """Raises UserError where these prompts (the table's, one by one, unless given) are not the manifest's."""
        contents = (prompt.content for prompt in prompts or self.prompts())
        if json_list_hash(contents) != self.manifest["prompts"]["hash"]:
            raise self._damaged(TABLES[1], "its prompts are not those whose hash the manifest has")


def dictionary_of(name: str, columns: Sequence[str]) -> list[str] | bool:
    """Which columns of a table are written with a dictionary: what `use_dictionary` of pyarrow's writer takes."""
    return [column for column in columns if name != TABLES[1] or column not in PLAIN] or False
