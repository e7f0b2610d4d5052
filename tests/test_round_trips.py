"""What is written is read back equal, whatever it holds: jobs, adapters, manifests, and files of prompts."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.adapters.adapter import Adapter
from workbench.adapters.low_rank import ACTS, LowRank
from workbench.jobs import Job
from workbench.prompts import PromptSet
from workbench.sites import POINTS, Site
from workbench.store.checks import manifest_text, read_manifest
from workbench.store.folder import Folder

quick = settings(max_examples=40, deadline=None)
texts = st.text(st.characters(codec="utf-8"), max_size=40)
plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(
    str.strip
)
names = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,20}", fullmatch=True)
words = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6,
)  # fmt: skip
toml_values = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5,
)  # fmt: skip
behaviours = st.fixed_dictionaries(
    {
        "name": words,
        "openers": st.lists(texts, min_size=1, max_size=3),
        "grader": texts,
        "validation": texts,
        "evaluation": texts,
    },
    optional={
        "grader_args": st.dictionaries(texts, toml_values, max_size=3),
        "adapter": texts,
        "demonstrations": texts,
    },
)
jobs = st.fixed_dictionaries(
    {
        "donor": st.fixed_dictionaries({"model": texts}),
        "recipient": st.fixed_dictionaries({"model": texts}),
        "behaviours": st.lists(behaviours, min_size=1, max_size=2),
    },
    optional={
        "name": names,
        "out": texts,
        "seed": st.integers(0, 2**31 - 1),
        "paste": st.fixed_dictionaries(
            {}, optional={"strength": finite, "alphas": st.lists(st.floats(0, 1e9), min_size=1)}
        ),
        "evaluate": st.fixed_dictionaries({}, optional={"native": st.booleans(), "dose": st.lists(finite, max_size=3)}),
    },
)


@given(jobs)
@quick
def test_a_job_is_the_same_after_its_own_text(data: dict[str, Any]):
    job = Job.parse(data)
    assert Job.parse(tomllib.loads(job.text)) == job
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.toml"
        file.write_text(job.text, encoding="utf-8", newline="")
        assert Job.load(file) == job


@st.composite
def parts(draw: Any, width: int) -> LowRank:
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    V, b, U = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((width, rank), (rank,), (rank, width)))
    return LowRank(V, b, U, draw(st.sampled_from(sorted(ACTS))))


@st.composite
def adapters(draw: Any) -> Adapter:
    width = draw(st.integers(1, 4))
    sites = draw(
        st.lists(st.builds(Site, st.integers(0, 40), st.sampled_from(POINTS)), min_size=1, max_size=3, unique=True)
    )
    made = Adapter(
        {site: draw(parts(width)) for site in sites},
        draw(st.sampled_from(["last", "all", "first:2", "last:3+first:1"])),
        draw(st.floats(-1e6, 1e6)),
        draw(texts),
        {"name": draw(texts)},
        {"any": draw(json_values)},
    )
    return made


@given(adapters())
@quick
def test_an_adapter_is_the_same_after_its_folder(adapter: Adapter):
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "a")
        back = Adapter.load(Path(folder) / "a")
        assert back == adapter
        assert (back.name, back.meta, back.hash) == (adapter.name, adapter.meta, adapter.hash)
        back.save(Path(folder) / "b")
        for file in (Path(folder) / "a").iterdir():
            assert (Path(folder) / "b" / file.name).read_bytes() == file.read_bytes()


@given(st.dictionaries(texts, json_values, max_size=5))
@quick
def test_a_manifest_is_the_same_after_its_text(more: dict[str, Any]):
    manifest = {**more, "format": "workbench.store", "schema": 2}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_text(manifest_text(manifest), encoding="utf-8", newline="")
        found = read_manifest(Folder(Path(folder)))
    checksum = found.pop("checksum")
    assert found == {key: value for key, value in manifest.items() if key != "checksum"}
    assert manifest_text(found) == manifest_text(manifest)
    assert len(checksum) == 64


prompts = st.lists(st.fixed_dictionaries({"text": plain, "id": plain, "label": plain}), min_size=1, max_size=5)


@given(prompts)
@quick
def test_prompts_are_the_same_from_python_jsonl_json_csv_and_parquet(rows: list[dict[str, str]]):
    import pandas as pd

    wanted = PromptSet.load(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "id", "label"])
    writer.writeheader()
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
        (Path(folder) / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(folder) / "a.json").write_text(json.dumps(rows))
        pd.DataFrame(rows).to_parquet(Path(folder) / "a.parquet", index=False)
        for name in ("a.csv", "a.jsonl", "a.json", "a.parquet"):
            found = PromptSet.load(Path(folder) / name)
            assert found.prompts == wanted.prompts
            assert found.hash == wanted.hash


@given(st.lists(plain, min_size=1, max_size=6))
@quick
def test_a_text_file_gives_its_lines(lines: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
        found = [prompt.user for prompt in PromptSet.load(Path(folder) / "a.txt").prompts]
    assert found == [line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(lines)]
