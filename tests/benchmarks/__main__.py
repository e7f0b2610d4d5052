"""Runs the benchmarks and writes docs/benchmarks.md: `make bench`, or `python -m tests.benchmarks [SECTION ...]`.

Each section is run in a process of its own and kept in docs/benchmarks.json, so that one can be done again alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import tables

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"


def machine() -> dict[str, Any]:
    """What the figures were measured on, without its name."""
    import platform

    import torch

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(), "device": gpu or f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB",
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "transformer-lens", "nnsight", "scikit-learn")},
    }  # fmt: skip


def run(name: str) -> dict[str, Any]:
    """One section in a fresh interpreter, in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        code = f"import sys; from tests.benchmarks.__main__ import measure; measure({name!r}, sys.argv[1], sys.argv[2])"
        out = Path(folder) / "result.json"
        (Path(folder) / "work").mkdir()
        # as the command line has it: threads that wait do not spin beside those that work
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        line = [sys.executable, "-c", code, str(out), str(Path(folder) / "work")]
        subprocess.run(line, cwd=ROOT, env=environment, check=True)
        return json.loads(out.read_text())


def measure(name: str, out: str, folder: str) -> None:
    """What `run` starts: measures a section and writes its result."""
    result = tables.SECTIONS[name].measure(Path(folder))
    Path(out).write_text(json.dumps({"result": result, "on": machine()}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(tables.SECTIONS)} [all for a CPU]"
    )
    wanted = parser.parse_args().sections or [n for n, s in tables.SECTIONS.items() if not s.gpu]
    if unknown := sorted(set(wanted) - set(tables.SECTIONS)):
        parser.error(f"unknown sections {', '.join(unknown)}; allowed: {', '.join(tables.SECTIONS)}")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in wanted:
        sys.stderr.write(f"{name} ...\n")
        kept[name] = run(name)
        KEPT.write_text(json.dumps({n: kept[n] for n in tables.SECTIONS if n in kept}, indent=1) + "\n")
        PAGE.write_text(tables.page(kept))


if __name__ == "__main__":
    main()
