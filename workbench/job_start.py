"""A job that is written to a file of its own and run in a process of its own, which outlives the one that started it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .jobs import Job


@dataclass(frozen=True)
class Started:
    """A job that runs by itself."""

    file: Path
    """the job file"""
    folder: Path
    """the run folder that it makes"""
    output: Path
    """what its process prints"""
    pid: int


def write_job(job: Job, folder: str | Path) -> Path:
    """Writes NAME.toml into a folder and returns its path; UserError where it is there: nothing is overwritten."""
    file = Path(folder) / f"{job.name}.toml"
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(job.text)
    except FileExistsError:
        raise UserError(f"{file} is there already; give the job another name") from None
    except OSError as err:
        raise UserError(f"cannot write {file}: {err.strerror}") from err
    return file


def start_job(job: Job, folder: str | Path) -> Started:
    """Writes a job into a folder and runs it there in a process of its own; returns at once.

    Raises UserError where the job file or the run folder is there already, and what `Job.parse` refuses.
    """
    root = Path(folder)
    job = Job.parse(job.model_dump(exclude_none=True) | {"out": str(root)})
    if job.folder.exists():
        raise UserError(f"{job.folder} is there already; give the job another name")
    file = write_job(job, root)
    output = root / f"{job.name}.out.txt"
    line = [sys.executable, "-m", "workbench", "run", str(file)]
    with output.open("xb") as handle:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Started(file, job.folder, output, process.pid)
