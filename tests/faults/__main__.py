"""Injects every fault at every step of every verb that writes, and says what is wrong: `make faults`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process of several threads is not forked
os.environ.setdefault("WORKBENCH_PROGRESS", "0")

from .subjects import SUBJECTS, prepare, prepare_given
from .trials import FAULTS, Found, every, tried


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="VERB", help=f"of {', '.join(SUBJECTS)} [all]")
    parser.add_argument("--each", type=int, default=8, help="events of a step at which a fault is put; 0: all")
    parser.add_argument("--sample", type=int, help="so many cases, every fault and every step among them")
    parser.add_argument("--seed", type=int, default=0, help="of the events and the sample")
    parser.add_argument("--only", help=f"faults, with commas, of {', '.join(FAULTS)} [all]")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    given = parser.parse_args()
    if unknown := set(given.subjects) - set(SUBJECTS):
        parser.error(f"unknown verbs {', '.join(sorted(unknown))}; allowed: {', '.join(SUBJECTS)}")
    if given.only and (unknown := set(given.only.split(",")) - set(FAULTS)):
        parser.error(f"unknown faults {', '.join(sorted(unknown))}; allowed: {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        found = matrix(Path(folder), given.subjects or list(SUBJECTS), given)
    wrong = [one for one in found["found"] if one["wrong"]]
    if given.json:
        print(json.dumps(found))
    else:
        print(table(found["found"]))
        for one in wrong:
            print(f"{one['case']}: {'; '.join(one['wrong'])}")
        print(f"{len(found['found'])} cases in {found['seconds']:.0f} s, {len(wrong)} of them wrong")
    sys.exit(bool(wrong))


def matrix(folder: Path, subjects: list[str], given: Any) -> dict[str, Any]:
    """All cases, or a sample of them: what was found, and the steps that each subject has."""
    began = time.perf_counter()
    import_all()
    logging.getLogger("workbench").setLevel(logging.CRITICAL)  # of what this process looks at; children have their own
    prepare(folder)
    prepare_given(folder)
    found: list[Found] = []
    steps: dict[str, list[str]] = {}
    wanted = set(given.only.split(",")) if given.only else set(FAULTS)
    for whole, cases in every(folder, subjects, given.each or 10**9, given.seed, engine="worker" in wanted):
        steps[whole.subject.name] = list(dict.fromkeys(event.place for event in whole.events))
        chosen = [case for case in cases if case.fault in wanted]
        if given.sample:
            chosen = covering(chosen, given.sample)
        for case in chosen:
            found.append(tried(folder, whole, case))
            if not given.json:
                sys.stderr.write(f"\n{case}: {'; '.join(found[-1].wrong)}\n" if found[-1].wrong else ".")
                sys.stderr.flush()
    listed = [
        {"case": str(f.case), "subject": f.case.subject, "fault": f.case.fault, "step": f.case.event.place,
         "wrong": list(f.wrong), "said": f.said, "code": f.code, "kept": f.kept} for f in found
    ]  # fmt: skip
    return {"found": listed, "steps": steps, "seconds": time.perf_counter() - began}


def covering(cases: list[Any], most: int) -> list[Any]:
    """Cases that touch every step and every fault, as few as that takes or as many as `most`: each next one is of the
    fault and the step that were tried least. What follows a step counts as the step."""
    chosen: list[Any] = []
    faults, steps = Counter[str](), Counter[str]()
    left = list(cases)
    while left and (
        len(chosen) < most or {c.fault for c in left} - set(faults) or {c.event.place for c in left} - set(steps)
    ):
        best = min(left, key=lambda case: (faults[case.fault] + steps[case.event.place], faults[case.fault]))
        left.remove(best)
        chosen.append(best)
        faults[best.fault] += 1
        steps[best.event.place] += 1
    return chosen


def import_all() -> None:
    """What the verbs import on their way, once."""
    from importlib import import_module
    from pkgutil import walk_packages

    for name in ("pandas", "plotly.graph_objects", "pyarrow.parquet", "scipy.stats", "sklearn.linear_model", "torch"):
        import_module(name)
    for package in ("workbench", "probes"):
        for module in walk_packages(import_module(package).__path__, f"{package}."):
            if not module.name.rpartition(".")[2].startswith(
                ("__main__", "transformer_lens", "nnsight", "ndif", "estimators")
            ):
                import_module(module.name)


def table(found: list[dict[str, Any]]) -> str:
    """Cases by verb and fault; those that went wrong after a slash."""
    rows = [["verb", *FAULTS]]
    for subject in dict.fromkeys(one["subject"] for one in found):
        row = [subject]
        for fault in FAULTS:
            mine = [one for one in found if (one["subject"], one["fault"]) == (subject, fault)]
            bad = sum(bool(one["wrong"]) for one in mine)
            row.append(f"{len(mine)}" + (f"/{bad}" if bad else "") if mine else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


if __name__ == "__main__":
    main()
