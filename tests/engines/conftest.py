"""One Ray cluster of two workers for all tests that need one, and a small model in a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.engines import Engine, open_engine
from workbench.engines.cluster import connected
from workbench.models import Model, load

from ..conftest import make_module, save_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("engines") / "llama")


@pytest.fixture(scope="session")
def saved(model_folder: Path) -> Model:
    return load(model_folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with connected(None, n_cpus=2):
        yield


@pytest.fixture(scope="session")
def two(cluster: None) -> Iterator[Engine]:
    """Ray with two workers."""
    with open_engine("ray", workers=2) as engine:
        yield engine
