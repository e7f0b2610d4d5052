"""A transport grid on disk: json, parquet and safetensors, never a pickle. Its maps are files of their own, read late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from ..atomic import staged_folder, write_json
from ..errors import UserError
from ..maps.linear_map import read_safetensors
from ..parquet_files import read_frame
from ..sites import Site
from ..small_files import read_json
from .map_files import MapFolder, copy_maps

if TYPE_CHECKING:
    from .grid import TransportGrid
    from .pairs import SitePair

FORMAT, VERSION, MARKER = "workbench.transport_grid", 2, "grid.json"
MAPS = ("operators", "controls")


def save_grid(grid: TransportGrid, path: str | Path, *, overwrite: bool = False) -> None:
    """See `TransportGrid.save`."""
    from .. import __version__

    header = {"format": FORMAT, "version": VERSION, "made_by": __version__, "meta": dict(grid.meta),
              "pairs": [[str(a), str(b)] for a, b in grid.pairs]}  # fmt: skip
    with staged_folder(path, marker=MARKER, overwrite=overwrite) as folder:
        write_json(folder / MARKER, header)
        grid.table.to_parquet(folder / "grid.parquet", index=False)
        _write(folder / "per_output.safetensors", {_key(pair): value for pair, value in grid.per_output.items()})
        for name in MAPS:
            copy_maps(getattr(grid, name), folder / name)


def load_grid(path: str | Path) -> TransportGrid:
    """See `TransportGrid.load`."""
    from .grid import TransportGrid

    path = Path(path)
    header = _header(path)
    try:
        table = read_frame(path / "grid.parquet")
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: its grid.parquet is missing or damaged; run the transport again") from err
    lacking = [name for name in _columns() if name not in table.columns]
    meta = header.get("meta")
    if lacking or not isinstance(meta, dict) or not isinstance(meta.get("warnings"), list) or "model" not in meta:
        raise UserError(
            f"{path}: its grid lacks {', '.join(lacking) or 'its model or warnings'}; run the transport again"
        )
    if not all(isinstance(name, str) for key in ("source", "target", "arm") for name in table[key]):
        raise UserError(f"{path}: its grid names sites and arms by other than words; run the transport again")
    tensors, _ = read_safetensors(path / "per_output.safetensors")
    try:
        pairs: list[SitePair] = [(Site.parse(a), Site.parse(b)) for a, b in header["pairs"]]
        outputs = {pair: tensors[_key(pair)] for pair in pairs}
        return TransportGrid(table, outputs, header["meta"], *(MapFolder(path / name) for name in MAPS))
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(
            f"{path}: its {MARKER} and its tensors do not fit together ({err}); run the transport again"
        ) from err


def _columns() -> list[str]:
    """What every table of a grid has."""
    from ..maps.scores import METRICS

    return ["source", "target", "arm", "bos", *(f"r2_{metric}" for metric in METRICS)]


def _header(path: Path) -> dict[str, Any]:
    try:
        header = read_json(path / MARKER)
    except (OSError, ValueError) as err:
        raise UserError(f"{path} is no transport grid: its {MARKER} is missing or cannot be read as JSON") from err
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path / MARKER} does not say format {FORMAT!r}, version {VERSION}; run the transport again")
    return header


def _key(pair: SitePair) -> str:
    return f"{pair[0]}>{pair[1]}"


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    file.write_bytes(to_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))
