"""Files of maps and moments that are damaged, foreign or of another version: one clear line, never a traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbench.errors import UserError
from workbench.maps import GroupedMoments, LinearMap, Moments

from .example_rows import noise

Load = Callable[[Path], Any]


def saved_moments(folder: Path) -> tuple[Path, Path, Load]:
    path = folder / "m.safetensors"
    Moments(products=torch.float32).update({"x": noise(9, 3), "y": noise(9, 2)}).save(path)
    return path, path, Moments.load


def saved_map(folder: Path) -> tuple[Path, Path, Load]:
    path = folder / "map.safetensors"
    LinearMap(noise(3, 2).float(), torch.zeros(2), {"n": 9}).save(path)
    return path, path, LinearMap.load


def saved_map_folder(folder: Path) -> tuple[Path, Path, Load]:
    LinearMap(noise(3, 2).float(), torch.zeros(2), {"n": 9}).save(folder / "map")
    return folder / "map", folder / "map" / "map.json", LinearMap.load


def saved_groups(folder: Path) -> tuple[Path, Path, Load]:
    GroupedMoments("fold", "kind").update({"x": noise(9, 3)}, fold=[0, 1, 2] * 3, kind="word").save(folder / "g")
    return folder / "g", folder / "g" / "groups.json", GroupedMoments.load


every_kind = pytest.mark.parametrize("make", [saved_moments, saved_map, saved_map_folder, saved_groups])


def header_of(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with safe_open(file, framework="pt") as handle:
        return json.loads(handle.metadata()["workbench"])


def write_header(file: Path, header: object) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    if file.suffix == ".json":
        file.write_text(text)
        return
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    save_file(tensors, file, {"workbench": text})


def refused(load: Load, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert path.name in said
    return said


@every_kind
def test_a_header_without_any_one_of_its_keys_is_refused(make, tmp_path):
    path, file, load = make(tmp_path)
    whole = header_of(file)
    assert {"format", "version", "meta"} <= set(whole)
    for key in whole:
        write_header(file, {k: v for k, v in whole.items() if k != key})
        expected = {"format": "does not say format", "version": "of version None; this release reads version"}
        assert expected.get(key, f"is damaged: its header has no {key}") in refused(load, path)
        for other in (None, 7.5, True, -1, "fault", [3], [["x"]], {"a": 1}, [["x", "fault"]], [None] * 3):
            write_header(file, {**whole, key: other})
            if not (key == "meta" and isinstance(other, dict)):
                refused(load, path)
    write_header(file, whole)
    load(path)


@every_kind
def test_a_header_that_is_none_is_refused(make, tmp_path):
    path, file, load = make(tmp_path)
    for text in ("", "not json", "{", "[" * 100_000):
        write_header(file, text)
        assert "header cannot be read as JSON" in refused(load, path)
    for header in ([], "text", 3, None, {}):
        write_header(file, json.dumps(header))
        assert "does not say format" in refused(load, path)


@every_kind
def test_whatever_happens_to_the_bytes_is_told_or_harmless(make, tmp_path):
    path, _, load = make(tmp_path)
    files = [path] if path.is_file() else sorted(path.iterdir())
    rng = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for size in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            if whole[size:].strip():
                refused(load, path)
        for _ in range(150):
            cut = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                cut[rng.randrange(min(len(cut), 900))] = rng.randrange(256)
            file.write_bytes(bytes(cut))
            try:
                load(path)
            except UserError as err:
                assert "\n" not in str(err)  # noqa: PT017
        file.write_bytes(whole)
    load(path)


@pytest.mark.parametrize("make", [saved_moments, saved_map])
def test_tensors_that_are_not_those_of_the_header_are_refused(make, tmp_path):
    path, _, load = make(tmp_path)
    with safe_open(path, framework="pt") as handle:
        tensors, metadata = {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()  # noqa: SIM118
    for key, value in tensors.items():
        for changed in (None, value[..., :1], value.long(), value[None], torch.tensor(1.0)):
            rest = {k: v.clone() for k, v in tensors.items() if k != key}
            save_file(rest if changed is None else {**rest, key: changed.clone()}, path, metadata)
            refused(load, path)
    save_file({**tensors, "other": torch.zeros(1)}, path, metadata)
    assert "other" in refused(load, path)
