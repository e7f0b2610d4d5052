"""The house rules that a reader of the design card may rely on, read off the source and off a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGES = ("workbench", "probes", "ui")
VERBS = tuple(sorted(file.stem for file in (ROOT / "workbench").glob("cli*.py")))
HEAVY = (
    "torch",
    "transformers",
    "streamlit",
    "nnsight",
    "transformer_lens",
    "ray",
    "pandas",
    "plotly",
    "sklearn",
    "pyarrow",
)
"""imported where they are used, never by `import workbench` or by `workbench --help`"""


def sources(*packages: str) -> list[Path]:
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, anywhere in it; `if TYPE_CHECKING` aside."""
    module, package = module_of(file), file.name == "__init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        child for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def offences(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files for name in imports(file)
        if any(name == wrong or name.startswith(wrong + ".") for wrong in forbidden)
    ]  # fmt: skip


def test_imports_go_from_the_explorer_to_the_probes_to_the_workbench():
    # the command line alone starts what lies above it: `workbench transport`, `lens`, `probe` and their kin run probes, `ui` a
    # server
    names = ("transport", "lens", "probe", "similarity", "geometry", "depth", "fold", "ui")
    above = tuple(f"cli_{name}.py" for name in names)
    below = [file for file in sources("workbench") if file.name not in above]
    assert offences(below, ("probes", "ui", "streamlit")) == []
    assert offences(sources("workbench"), ("streamlit",)) == []
    assert offences(sources("probes"), ("ui", "streamlit")) == []


def test_maps_know_tensors_and_nothing_of_models():
    maps = sorted((ROOT / "workbench" / "maps").glob("*.py"))
    others = {f"workbench.{file.stem}" for file in (ROOT / "workbench").glob("*.py")} - {
        "workbench.__init__", "workbench.errors", "workbench.atomic", "workbench.small_files",
    }  # fmt: skip
    folders = {f"workbench.{p.name}" for p in (ROOT / "workbench").iterdir() if p.is_dir()} - {"workbench.maps"}
    assert offences(maps, ("transformers", *others, *folders)) == []


@pytest.mark.parametrize(
    ("layer", "above"),
    [
        (("errors", "atomic", "progress", "bundled", "sites", "offsets", "turns", "tokens", "prompts", "prompt_files",
          "rendering", "models", "replicas", "untrained", "generation", "conversation", "fingerprint", "anatomy", "work"),
         ("cli", "jobs", "transfer", "profile", "store", "convert", "forecast", "paste", "evaluate", "report", "plots")),
        (("backends", "store"),
         ("cli", "jobs", "transfer", "profile", "convert", "forecast", "paste", "evaluate", "report", "plots", "adapters")),
        (("alignment", "profile", "interrupts", "convert", "converter_specs", "layer_matching", "paired_profiles",
          "row_pairs", "sensitivity", "trials", "paste", "forecast", "adapters", "evaluate", "transport", "folding"),
         ("cli", "jobs", "transfer", "report", "plots", "summary")),
        (("jobs", "transfer", "job_options", "job_checks", "converter_files", "report", "plots", "summary", "doctor",
          "verification", "verification_table", "transport_plots", "lens_plots", "probe_plots", "similarity_plots",
          "geometry_plots", "depth_plots", "fold_plots", "report_page", "planning"),
         (*VERBS, "__main__")),
    ],
    ids=["models and prompts", "backends and stores", "verbs", "jobs"],
)  # fmt: skip
def test_inside_the_workbench_imports_go_down(layer: tuple[str, ...], above: tuple[str, ...]):
    files = [file for name in layer for file in sources("workbench") if module_of(file).split(".")[1:2] == [name]]
    assert files
    assert offences(files, tuple(f"workbench.{name}" for name in above)) == []


def test_a_library_does_not_print():
    for file in sources("workbench", "probes"):
        calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"], file


def test_every_module_says_what_it_is():
    without = [str(f.relative_to(ROOT)) for f in sources(*PACKAGES) if not ast.get_docstring(ast.parse(f.read_text()))]
    assert without == []


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print('LOADED', *sys.modules)"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return {name.split(".")[0] for name in line.split()}


def test_importing_the_workbench_imports_nothing_heavy():
    assert loaded_after("import workbench; dir(workbench)") & set(HEAVY) == set()


@pytest.mark.parametrize(
    "line",
    [
        ["--help"],
        ["--version"],
        ["profile", "--help"],
        ["plan", "--help"],
        ["transport", "--help"],
        ["lens", "--help"],
        ["fold", "--help"],
        ["train", "--help"],
        ["convert"],
        ["stores", "merge", "--help"],
        ["nonsense"],
    ],
)
def test_help_imports_nothing_heavy(line: list[str]):
    code = f"from workbench.cli import app\ntry: app({line!r}, prog_name='workbench')\nexcept SystemExit: pass"
    assert loaded_after(code) & set(HEAVY) == set()


def test_every_public_name_is_there():
    import workbench

    for name in workbench.__all__:
        value = getattr(workbench, name)
        assert callable(value), f"workbench.{name} is a {type(value).__name__}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        workbench.nonsense  # noqa: B018


def test_the_package_shows_its_public_names_alone():
    import workbench

    assert [name for name in dir(workbench) if not name.startswith("__")] == workbench.__all__
