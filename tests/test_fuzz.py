"""A bounded run of every fuzz target, the inputs that once broke a parser, and the watch that would see them."""

from __future__ import annotations

import base64
import json
import os
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from safetensors.torch import save as to_bytes

from workbench.errors import MOST, UserError

from .fuzz import bundles, runner, target
from .fuzz.corpus import draw, files, parquet, torch_bytes
from .fuzz.targets import TARGETS
from .fuzz.watch import Broken

RUNS = 250
"""inputs of a target of rate 1; `make fuzz` is the long run"""


@pytest.fixture(autouse=True)
def found_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "FOUND", tmp_path / "found")
    monkeypatch.setattr(runner, "HERE", tmp_path / "a" / "b")
    # types are checked under pytest alone, before what a parser itself has to say of them
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_reads_or_refuses_in_one_line_whatever_it_is_given(name, tmp_path):
    one = TARGETS[name]
    try:
        one.warm()
        with warnings.catch_warnings(action="ignore"):
            broken = runner.seeded(one, max(12, round(RUNS * one.rate)), seed=1)
    finally:
        one.close()
    assert broken == [], "\n".join(file.read_text()[-2000:] for file in (tmp_path / "found").glob("*.txt"))


def with_data(name: str, *contents: dict[str, Any]) -> list[bytes]:
    return files(TARGETS[name].names, *contents)


DEEP = b"[" * 100_000
HUGE = "9" * 400
LOUD = "a\nb\x1b[31m\u202e" * 3000


def lying(header: bytes | dict[str, Any], length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


# a parquet file of no columns with a group of -2,496 rows, at which pyarrow ends the process
FEWER_THAN_NO_ROWS = base64.b64decode(
    "AACwAAAAUEFSMRUEGRw1ABgGc2NoZW1hFQAAFgAZHBkMFgAW/yYAFgAAGRwYDEFSUk9XOnNjaGVtYRhMLy8vLy96QUFBQUFRQUFBQUFBQUtBQXdBQmdB"
    "RkFBZ0FDZ0FBQUFBQkJBQU1BQUFBQ0FBSUFBQUFCQUFJQUFBQUJBQUFBQUFBQUFBPQAYIHBhcnF1ZXQtY3BwLWFycm93IHZlcnNpb24gMjYuMC4xGQwA"
    "pAAAAFBBUjE="
)

ONCE_BROKEN = [
    ("converters", {"converters.json": DEEP}),
    ("moments", {"moments.json": DEEP}),
    ("grid", {"grid.json": DEEP}),
    ("run", {"metrics.json": DEEP}),
    ("run", {"metrics.json": b'{"schema": 1, "behaviours": {"a": {"arms": [1]}}}'}),
    ("report", {"metrics.json": {"schema": 1, "behaviours": {"a": 3}}}),
    ("model-config", {"config.json": DEEP}),
    ("job", {"job.toml": b"a = " + DEEP}),
    ("job", {"job.toml": f"'{LOUD}' = 1".encode()}),
    ("map", {"a.safetensors": to_bytes({LOUD: draw(2)})}),
    ("map", {"a.safetensors": lying(b"{}", 1 << 63)}),
    ("map", {"a.safetensors": to_bytes({"weight": torch.zeros(1 << 40, 0), "bias": torch.zeros(0)})}),
    ("vectors", {"layer_3.safetensors": to_bytes({"v": draw(2, 4).to(torch.float8_e4m3fn)})}),
    ("vectors", {"layer_3.safetensors": lying({"v": {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}})}),
    ("lens", {"config.json": {"lens_type": []}, "params.safetensors": b""}),
    ("catalogue", {"transport.toml": b"model = 1\nprompts = []"}),
    ("probe-run", {"metrics.json": {"kind": 1, "label": LOUD, "best": [], "lines": []}}),
    ("probe-run", {"metrics.json": []}),
    ("torch", {"layer_3.pt": torch_bytes(torch.zeros(1).expand(1 << 40))}),
    ("prompts-parquet", {"a.parquet": FEWER_THAN_NO_ROWS}),
    ("prompts-parquet", {"a.parquet": parquet([{"prompt": "x" * 50_000}] * 8000)}),
    ("prompts-parquet", {"a.parquet": parquet([{"messages": [{"role": "user", "content": "x" * 50_000}]}] * 8000)}),
    (
        "converters",
        {
            "converters.json": {"format": "workbench.converters", "version": 1, "converters": [{"a": 1}]},
            "converters.safetensors": to_bytes({"a": draw(2)}),
        },
    ),
]


@pytest.mark.parametrize(
    ("name", "content"), ONCE_BROKEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ONCE_BROKEN)]
)
def test_what_once_broke_a_parser_is_refused(name, content):
    (data,) = with_data(name, content)
    with TARGETS[name].ready() as one:
        assert one.refusal(data)


@pytest.mark.parametrize("kind", [bundles.LINK, bundles.DANGLING, bundles.PIPE, bundles.FOLDER])
@pytest.mark.parametrize(
    "name", [n for n, one in TARGETS.items() if not one.named and n not in ("catalogue", "transport")]
)
def test_links_out_of_a_folder_and_pipes_are_refused(name, kind):
    with TARGETS[name].ready() as one:
        entries = bundles.unpack(one.seeds()[0], len(one.names))
        begin = time.monotonic()
        assert one.refusal(bundles.pack([(entries[0][0], kind, b""), *entries[1:]]))
        assert time.monotonic() - begin < target.SECONDS


def test_a_map_of_a_grid_that_is_a_link_out_of_it_is_refused():
    with TARGETS["grid"].ready() as one:
        entries = bundles.unpack(one.seeds()[0], len(one.names))
        linked = [
            (i, bundles.LINK if one.names[i].startswith("operators/") else kind, data) for i, kind, data in entries
        ]
        assert linked != entries
        assert one.refusal(bundles.pack(linked))


@pytest.mark.parametrize("name", [n for n, one in TARGETS.items() if one.named and n not in ("answers", "training")])
def test_a_pipe_that_the_user_names_is_not_waited_for(name):
    with TARGETS[name].ready() as one:
        assert one.refusal(bundles.pack([(0, bundles.PIPE, b"")]))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    from workbench.adapters.adapter import Adapter, vector
    from workbench.sites import Site

    vector(Site(1), draw(4)).save(tmp_path / "whole")
    here = tmp_path / "models--a--b" / "snapshots" / "1234"
    here.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for i, name in enumerate(("adapter.json", "adapter.safetensors")):
        os.rename(tmp_path / "whole" / name, tmp_path / "models--a--b" / "blobs" / str(i))
        (here / name).symlink_to(f"../../blobs/{i}")
    assert Adapter.load(here).layers == [1]


def test_an_error_is_one_line_of_bounded_length_and_keeps_its_advice():
    said = str(UserError(f"{LOUD}; do this"))
    assert len(said) <= MOST
    assert said.endswith("do this")
    assert said.isprintable()
    assert str(UserError("höchstens 3")) == "höchstens 3"


@pytest.mark.parametrize("broken", ["outside", "above", "write", "process", "message", "slow", "error", "link"])
def test_the_watch_sees_what_a_parser_may_not_do(broken, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("x")

    def harm(folder: Path) -> None:
        if broken == "outside":
            (tmp_path / "x").read_text()
        if broken == "above":
            (folder / ".." / "out" / "a.json").read_text()
        if broken == "write":
            (tmp_path / "y").write_text("y")
        if broken == "process":
            os.system("true")
        if broken == "message":
            err = UserError("x")
            err.args = ("two\nlines",)
            raise err
        if broken == "slow":
            time.sleep(3)
        if broken == "error":
            raise KeyError("x")
        if broken == "link":
            torch.from_file(str(folder / "a.json"), size=1, dtype=torch.uint8)  # C++, of which Python hears nothing

    monkeypatch.setattr(target, "SECONDS", 0.2)
    kind = bundles.LINK if broken == "link" else bundles.FILE
    one = target.Target("harm", ("a.json",), harm, lambda: [bundles.pack([(0, bundles.FILE, b"{}")])])
    wrong = {"slow": target.TooSlow, "error": KeyError, "message": AssertionError}.get(broken, Broken)
    try:
        with pytest.raises(wrong):
            one(bundles.pack([(0, kind, b"{}")]))
    finally:
        one.close()


def test_the_seeded_inputs_follow_from_the_seed_and_are_many():
    import random

    from .fuzz.mutation import mutate

    one = TARGETS["adapter"]
    seeds = one.seeds()
    first, again, other = ([mutate(seeds[0], one.names, random.Random(n), seeds) for n in range(start, start + 60)]
                           for start in (0, 0, 1000))  # fmt: skip
    assert first == again != other
    assert len(set(first)) > 50


def test_any_bytes_are_a_folder():
    assert bundles.unpack(b"\0" * 3, 2) == []
    assert bundles.unpack(b"\x05\x00\xff\xff\xff\xffab", 2) == [(1, 0, b"ab")]
