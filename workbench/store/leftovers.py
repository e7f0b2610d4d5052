"""What stopped runs leave beside stores: found, told apart from what is in use, and removed where it is asked for, or where
it is known to be of no further use."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..hashes import file_hash
from ..small_files import plain_file, read_json
from .checks import MANIFEST, MOMENTS, TABLES
from .locks import LOCK, hold, is_held

_PARTIAL = re.compile(r"\.(.+)\.partial")
_SUMS = re.compile(r"\..+\.moments-partial")
_STAGED = re.compile(r"\.(.+)\.partial-[A-Za-z0-9_]{8}")
_OLD = re.compile(r"\.(.+)\.old-[A-Za-z0-9_]{8}")
_REPAIR = re.compile(r"\.(.+)\.repair-[A-Za-z0-9_]{8}")
_REMOVED = re.compile(r"(\..+\.((moments-)?partial|(partial|old|repair)-\w{8})|workbench-\w{8})\.removed-\w{8}")
_MOMENTS = re.compile(r"lock|parts|now\.json|after-\d+|\.(after-\d+|now\.json)\.(partial|old)-\w{8}")
_TEMPORARY = re.compile(r"workbench-[A-Za-z0-9_]{8}")
_OURS = (_PARTIAL, _STAGED, _OLD, _REPAIR, _REMOVED)
PARTIAL_FILES = {"journal.jsonl", "journal.new", LOCK, "store", "old", "parts", "fetched"}
REPAIR_FILES = {*TABLES, "shard", LOCK}
EXPORT_FILES = re.compile(r"lock|.+\.(npy|parquet|arrow|json)|README\.md")
_TEMPORARY_FILES = {"profile", ".profile.partial", LOCK}


@dataclass(frozen=True)
class Leftover:
    """A folder that a run of the workbench left behind. `kept`: why it must stay; empty where it can go."""

    path: Path
    kind: str
    """unfinished store, unfinished moments, unfinished export, unfinished repair, interrupted replacement, interrupted
    removal, or temporary store."""
    n_bytes: int
    kept: str = ""


def target_of(partial: Path) -> Path | None:
    """The store that an unfinished folder `.NAME.partial` was to become; None where it is no such folder."""
    match = _PARTIAL.fullmatch(partial.name)
    if match is None or partial.is_symlink() or not partial.is_dir():
        return None
    names = {entry.name for entry in os.scandir(partial)}
    ours = (names & {"journal.jsonl", LOCK}) and names <= PARTIAL_FILES
    return partial.parent / match[1] if ours else None


def find_leftovers(folder: str | Path, *, temporary: bool = True) -> list[Leftover]:
    """The leftovers below a folder, and (with `temporary`) the temporary stores of this user's dead processes.

    Links are not followed. Nothing is listed that the workbench did not make, by its name and by what it holds; what a
    process holds, what is the last copy of a store, and what cannot be told is listed with the reason why it is kept.
    Raises UserError where there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds your stores")
    found, home = [], Path(tempfile.gettempdir())
    for root, folders, _ in os.walk(folder):
        if Path(root).resolve() == home.resolve():
            folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
        for name in sorted(folders):
            leftover = _leftover(Path(root, name))
            if leftover is not None:
                found.append(leftover)
        folders[:] = sorted(name for name in folders if not any(p.fullmatch(name) for p in _OURS))
    if temporary:
        # a half-removed one below `folder` was found above
        known = {one.path.resolve() for one in found}
        found += [one for path in sorted(home.glob("workbench-*"))
                  if path.resolve() not in known and (one := _temporary(path) or _removed(path))]  # fmt: skip
    return found


def remove_leftovers(leftovers: Sequence[Leftover]) -> list[Leftover]:
    """Removes those that can go, each looked at again under its lock; returns what became of them, `kept` as it is."""
    done = []
    for one in leftovers:
        now = one if one.kept else _temporary(one.path) or _leftover(one.path)
        if now is None:
            continue
        done.append(now if now.kept else _remove(now))
    return done


def clear_after(out: Path) -> None:
    """Removes what is beside a store or moments of a run that was stopped after they had their name: work of no further use.

    Anything else stays: unfinished work, what a process holds, and what cannot be removed.
    """
    for ending, over in ((".partial", _renamed), (".moments-partial", _sums_done)):
        partial = out.parent / f".{out.name}{ending}"
        with suppress(OSError):  # gone meanwhile, or a folder that cannot be read or written
            if partial.is_symlink() or not partial.is_dir() or not over(partial, out):
                continue
            if (handle := hold(partial)) is not None:
                try:
                    if over(partial, out):
                        _take_away(partial)
                finally:
                    os.close(handle)


def _renamed(partial: Path, out: Path) -> bool:
    """Whether the store that was made in this folder has left it, and no block of another one is there."""
    names = {entry.name for entry in os.scandir(partial)}
    blocks = any((partial / "parts").rglob("*.json"))
    return (out / MANIFEST).is_file() and names <= {"journal.jsonl", "parts", LOCK} and not blocks


def _sums_done(partial: Path, out: Path) -> bool:
    """Whether a folder holds no sums, or those of the moments that are there, and these are whole."""
    names = {entry.name for entry in os.scandir(partial)}
    if names <= {LOCK} or not all(map(_MOMENTS.fullmatch, names)):
        return names <= {LOCK}
    try:
        about = read_json(out / MOMENTS)
        parts = {entry.name for entry in os.scandir(partial / "parts")} if "parts" in names else set()
        now = read_json(partial / "now.json")["key"] if "now.json" in names else about["key"]
        mine = now == about["key"] and parts <= {about["key"][:16]}
        return mine and all(file_hash(plain_file(out / name)) == sha for name, sha in about["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _take_away(path: Path) -> None:
    """Removes a folder under a name that no run looks for: who comes meanwhile begins a folder of its own."""
    gone = Path(tempfile.mkdtemp(prefix=f"{path.name}.removed-", dir=path.parent))
    os.rename(path, gone)
    shutil.rmtree(gone)


def _remove(one: Leftover) -> Leftover:
    locks = [place for place in (one.path, one.path / ".profile.partial") if (place / LOCK).is_file()]
    handles = [hold(place) for place in locks]
    try:
        if None in handles:
            return replace(one, kept="a process is using it")
        if one.kind == "interrupted removal":
            shutil.rmtree(one.path)
        else:
            _take_away(one.path)
        return one
    except OSError as err:
        return replace(one, kept=f"cannot be removed: {err.strerror}")
    finally:
        for handle in handles:
            if handle is not None:
                os.close(handle)


def _leftover(path: Path) -> Leftover | None:
    if path.is_symlink() or not path.is_dir():
        return None
    target = target_of(path)
    if target is not None:
        kind = "interrupted replacement" if (path / "old").exists() else "unfinished store"
        return Leftover(path, kind, size_of(path), _why_kept(path, target))
    names, used = {entry.name for entry in os.scandir(path)}, "a process is using it" if is_held(path) else ""
    if _SUMS.fullmatch(path.name) and LOCK in names and all(map(_MOMENTS.fullmatch, names)):
        return Leftover(path, "unfinished moments", size_of(path), used)
    if _STAGED.fullmatch(path.name) and names & {LOCK, "export.json"}:  # the lock goes just before the last rename
        unknown = "" if LOCK in names else "no lock says whether it is used"
        return Leftover(path, "unfinished export", size_of(path), used or unknown)
    if _REPAIR.fullmatch(path.name) and LOCK in names and names <= REPAIR_FILES:
        return Leftover(path, "unfinished repair", size_of(path), used)
    if (match := _OLD.fullmatch(path.name)) and names == {"was"}:
        place = path.parent / match[1]
        kept = (
            "" if os.path.lexists(place) else f"it holds the only copy of {match[1]}: rename {path / 'was'} to {place}"
        )
        return Leftover(path, "interrupted replacement", size_of(path), kept)
    return _removed(path)


def _removed(path: Path) -> Leftover | None:
    """What a removal that was killed left: a part of what it had already judged."""
    if not _REMOVED.fullmatch(path.name) or path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.getuid():
        return None
    names = {entry.name for entry in os.scandir(path)}
    ours = PARTIAL_FILES | _TEMPORARY_FILES | REPAIR_FILES | {"was"}
    if not all(name in ours or _MOMENTS.fullmatch(name) or EXPORT_FILES.fullmatch(name) for name in names):
        return None
    return Leftover(path, "interrupted removal", size_of(path), "a process is using it" if is_held(path) else "")


def _why_kept(partial: Path, target: Path) -> str:
    if is_held(partial):
        return "a process is using it"
    if not target.exists() and (partial / "old").exists():
        return f"it holds the only copy of {target.name}: run `workbench stores repair {target}`"
    if not target.exists() and (partial / "store" / MANIFEST).is_file():
        return f"{target.name} is complete but for its name: run `workbench stores repair {target}`"
    return ""


def _temporary(path: Path) -> Leftover | None:
    if not _TEMPORARY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return None
    if path.stat().st_uid != os.getuid():
        return None
    names = {entry.name for entry in os.scandir(path)}
    if not names or not names <= _TEMPORARY_FILES:
        return None
    places = [place for place in (path, path / ".profile.partial") if (place / LOCK).is_file()]
    kept = "a process is using it" if any(map(is_held, places)) else "" if places else "no lock says whether it is used"
    return Leftover(path, "temporary store", size_of(path), kept)


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(Path(root, name)).st_size
            except OSError:  # gone since it was listed
                continue
    return total
