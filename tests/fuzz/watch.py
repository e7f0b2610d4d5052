"""What a parser may not do while it reads: reach outside its folder, start or call anything, or take too much memory."""

from __future__ import annotations

import ctypes
import os
import resource
import site
import struct
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 512 << 20
"""bytes that reading one input may take"""
SECONDS = 5.0
"""that it may take"""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = ("os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod",
         "os.chown", "os.truncate", "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move")  # fmt: skip
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn",
         "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto", "pickle.find_class",
         "urllib.Request", "ctypes.dlopen", "code.__new__", "marshal.loads", "os.putenv")  # fmt: skip
_OF_PYTHON = tuple(
    {
        os.path.realpath(p) + "/"
        for p in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages())
    }
    | {f"{ROOT}/{name}/" for name in ("workbench", "probes", "tests", "data")}
    | {"/proc/", "/sys/", "/usr/share/zoneinfo/"}
)

_SEARCHED = {os.path.abspath(p) for p in sys.path}
"""folders in which a late import looks for its module"""


class Broken(BaseException):
    """A rule that was broken; no `except Exception` of the code under test can hide it."""


class Watch:
    """Python's audit events while an input is read. The hook stays for the life of the process and does nothing else."""

    def __init__(self) -> None:
        self.folder, self.broken = "", ""
        self._of_system = _Opened()
        sys.addaudithook(self._event)

    def begin(self, folder: Path, outside: Path, links: bool) -> None:
        """From here on, only what lies in `folder` may be opened. With `links`, opens in `outside` are seen whoever makes
        them, C++ and Rust too."""
        self._links = links
        if links:
            self._of_system.begin(outside)
        self.broken, self.folder = "", str(folder)

    def end(self) -> str:
        """What was broken since `begin`; "" for nothing."""
        self.folder = ""
        if self._links and (name := self._of_system.opened()):
            self.broken = self.broken or f"followed a link and opened {name} outside the folder"
        return self.broken

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in NEVER:
            # a pyc of a module that is imported late is unmarshalled; that is the installation's own
            if event in ("marshal.loads", "code.__new__", "ctypes.dlopen"):
                return
            self._break(f"{event} {args!r:.120}")
        elif event == "open":
            path, _, flags = args
            self._check(path, bool(isinstance(flags, int) and flags & WRITES))
        elif event in PATHS and args:
            for path in args[: 2 if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else 1]:
                self._check(path, event not in ("os.listdir", "os.scandir"))

    def _check(self, path: Any, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, which was checked when it was opened
        text = os.fsdecode(path)
        if not os.path.isabs(text):  # beside a descriptor of the folder, or of where the process stands
            if ".." in text.split("/"):
                self._break(f"opened {text!r:.120}")
            return
        plain = os.path.normpath(text)
        if plain == self.folder or plain.startswith(self.folder + "/") or (not writes and plain.startswith(_OF_PYTHON)):
            return
        if plain in ("/dev/null", "/dev/urandom", "/etc/localtime") or f"{plain}/" in _OF_PYTHON or plain in _SEARCHED:
            return
        self._break(f"{'wrote to' if writes else 'opened'} {text!r:.120} outside the folder")

    def _break(self, what: str) -> None:
        self.broken = self.broken or what
        raise Broken(what)


class _Opened:
    """inotify on a folder: which of its files were opened, by any code of any language."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC) if sys.platform == "linux" else -1
        self._seen: set[str] = set()

    def begin(self, folder: Path) -> None:
        if str(folder) not in self._seen and self._fd >= 0:
            self._seen.add(str(folder))
            for one in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
                self._libc.inotify_add_watch(self._fd, os.fsencode(one), 0x20 | 0x40000000)  # IN_OPEN, but of folders
        self.opened()

    def opened(self) -> str:
        try:
            data = os.read(self._fd, 1 << 16) if self._fd >= 0 else b""
        except BlockingIOError:
            return ""
        at, names = 0, []
        while at + 16 <= len(data):
            _, mask, _, size = struct.unpack_from("iIII", data, at)
            if mask & 0x20 and not mask & 0x40000000:
                names.append(data[at + 16 : at + 16 + size].rstrip(b"\0").decode(errors="replace"))
            at += 16 + size
        return ", ".join(names)


def peak() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
