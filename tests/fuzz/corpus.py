"""What the inputs begin from: small artefacts of every kind, written by the code itself or as other programs write them."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes

from workbench.sites import Site

from . import bundles

Names = Sequence[str]
STORE = ("manifest.json", "rows.parquet", "prompts.parquet", "shards/00000.safetensors", "shards/00001.safetensors")
GRID = ("grid.json", "grid.parquet", "per_output.safetensors", "operators/resid_post.0_to_resid_post.1.safetensors")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(names: Names, *makers: Callable[[Path], Any]) -> list[bytes]:
    """An input for each maker, of what it writes at the path that it is given."""
    found = []
    for make in makers:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "a")
            found.append(bundles.of_folder(Path(folder) / "a", names))
    return found


def files(names: Names, *contents: dict[str, Any]) -> list[bytes]:
    """An input for each {name: content}; what is not bytes is written as JSON."""
    return [
        bundles.pack([
            (names.index(name), bundles.FILE, one if isinstance(one, bytes) else json.dumps(one).encode())
            for name, one in content.items()
        ])
        for content in contents
    ]  # fmt: skip


def torch_bytes(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def one_file(write: Callable[[Path], Any], suffix: str) -> bytes:
    """The content of a file that is written at the path given."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a{suffix}"
        write(file)
        return file.read_bytes()


def stores() -> list[bytes]:
    from ..store.made import made_store

    sites, texts = (Site(0), Site(1)), ["a b c", "d e"]

    def make(path: Path, dtype: torch.dtype = torch.float32) -> None:
        made_store(
            path, {s: draw(5, 3, seed=s.layer).to(dtype) for s in sites}, texts, labels=["x", None], group=2, shard=3
        )

    return made(STORE, make, lambda path: make(path, torch.bfloat16))


def adapters() -> list[Callable[[Path], Any]]:
    from workbench.adapters.adapter import Adapter, vector
    from workbench.adapters.low_rank import LowRank

    part = LowRank(draw(4, 2), draw(2, seed=1), draw(2, 4, seed=2), "gelu")
    whole = Adapter(
        {Site(0): part, Site(2, "mlp_out"): part * 2}, "first:2", 0.5, "n", {"name": "m", "weights": "ab"}, {"k": 1}
    )
    two = Adapter({Site(1): part}, "first:1") + Adapter({Site(1): part}, "last")
    return [whole.save, two.save, lambda p: whole.save(p, storage="int8"), vector(Site(1), draw(4)).save]


def pyreft(path: Path) -> None:
    from workbench.adapters.adapter import Adapter
    from workbench.adapters.low_rank import LowRank
    from workbench.adapters.pyreft import write

    part = LowRank(draw(4, 2), draw(2, seed=1), draw(2, 4, seed=2))
    write(Adapter({Site(0): part, Site(1): part}, "first:1") + Adapter({Site(0): part, Site(1): part}, "last"), path)


PYREFT = ("config.json", "training_metadata.json", *(
    f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#{unit}.bin" for layer in (0, 1) for unit in (0, 1)))  # fmt: skip


def bottleneck_files() -> dict[str, Any]:
    state = {}
    for place in ("attention", "output"):
        name = f"transformer.h.1.{place}_adapters.adapters.task."
        state |= {
            f"{name}adapter_down.0.weight": draw(2, 4),
            f"{name}adapter_down.0.bias": draw(2),
            f"{name}adapter_up.weight": draw(4, 2),
            f"{name}adapter_up.bias": draw(4),
            f"{name}scaling": draw(1),
        }
    config = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True, "non_linearity": "relu",
              "scaling": "learned"}  # fmt: skip
    said = {"config": config, "model_type": "gpt2", "model_name": "gpt2", "version": "adapters.1.0.0"}
    return {"adapter_config.json": said, "adapter.safetensors": to_bytes(state)}


def lora_files() -> dict[str, Any]:
    name = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {f"{name}.lora_A.weight": draw(2, 4), f"{name}.lora_B.weight": draw(3, 2), f"{name}.bias": draw(3)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "donor", "init_lora_weights": True,
              "rank_pattern": {}, "alpha_pattern": {"down_proj": 8}, "use_rslora": True}  # fmt: skip
    return {"adapter_config.json": config, "adapter_model.safetensors": to_bytes(tensors)}


def control_vectors() -> list[bytes]:
    from workbench.adapters.adapter import Adapter, vector
    from workbench.adapters.control_vector import write

    two: Adapter = vector(Site(1), draw(4), positions="all") + vector(Site(2), draw(4, seed=1), positions="all")
    return [
        one_file(lambda file, a=a: write(a, file), ".gguf") for a in (two, vector(Site(3), draw(9), positions="all"))
    ]


def torch_files() -> list[bytes]:
    """Archives of everything that weights_only admits."""
    loop: list[Any] = [draw(3)]
    loop.append(loop)
    wide = torch.zeros(1).expand(1 << 40)
    with warnings.catch_warnings(action="ignore"):  # torch deprecates quantised tensors, and files may hold them
        quantised = torch_bytes(torch.quantize_per_tensor(draw(4), 0.1, 0, torch.qint8))
    return [quantised] + [
        torch_bytes(v)
        for v in (
            draw(4),
            {3: draw(4), 5: draw(4)},
            draw(3, 4),
            OrderedDict(a=draw(2).int()),
            {"resid_post.1": draw(4).half()},
            loop,
            wide,
            draw(2, 2).to_sparse(),
            {"x": [1, "a", None, (2.5, True)]},
            torch.nn.Parameter(draw(4)),
            torch.tensor(5),
            {"layer_1": draw(1, 4)},
            draw(4).to(torch.complex64),
        )
    ]


def adapter_bias() -> dict[str, torch.Tensor]:
    name = "model.layer.5.output.adapter_"
    return {f"{name}vector": draw(4), f"{name}alpha.weight": draw(1, 4), f"{name}alpha.bias": draw(1)}


def moments() -> Any:
    from workbench.maps import Moments

    found = Moments()
    found.update({"a": draw(5, 2), "b": draw(5, 3, seed=1)})
    return found


def moment_folder() -> dict[str, Any]:
    from workbench.hashes import file_hash

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fold-0.safetensors"
        moments().save(file)
        about = {
            "format": "workbench.profile_moments",
            "schema": 1,
            "folds": 2,
            "model": {"name": "m"},
            "prompts": {"name": "p"},
            "n_rows": 5,
            "sites": {"a": {}},
            "tokens": "all",
            "files": {f"fold-{i}.safetensors": file_hash(file) for i in (0, 1)},
        }
        return {"moments.json": about, "fold-0.safetensors": file.read_bytes(), "fold-1.safetensors": file.read_bytes()}


def grouped(path: Path) -> None:
    from workbench.maps.grouped import GroupedMoments

    found = GroupedMoments("fold", "kind")
    found.update({"a": draw(4, 2)}, fold=[0, 1, 0, 1], kind="w")
    found.save(path)


def dictionary(kind: str) -> Any:
    from probes.dictionaries import Dictionary

    more: dict[str, Any] = {"relu": {}, "topk": {"k": 2}, "jumprelu": {"threshold": draw(3).abs()},
                            "gated": {"r_mag": draw(3), "b_mag": draw(3)}}[kind]  # fmt: skip
    return Dictionary(draw(4, 3), draw(3), draw(3, 4), draw(4), kind, site="resid_post.1", model="m", **more)


def gemma() -> bytes:
    d, buffer = dictionary("jumprelu"), io.BytesIO()
    np.savez(buffer, **{name: value.numpy() for name, value in d.tensors.items()})
    return buffer.getvalue()


def learned() -> dict[str, Any]:
    d = dictionary("relu")
    state = {"encoder.weight": d.W_enc.T, "encoder.bias": d.b_enc, "decoder.weight": d.W_dec.T, "bias": d.b_dec}
    trainer = {"dict_class": "AutoEncoder", "layer": 3, "lm_name": "m", "submodule_name": "resid_post_layer_3", "k": 2}
    return {"config.json": {"trainer": trainer}, "ae.pt": torch_bytes(state)}


def lens_files() -> list[dict[str, Any]]:
    config = {"base_model_name_or_path": "m", "base_model_revision": None, "bias": True, "d_model": 3, "num_hidden_layers": 2,
              "lens_type": "linear_tuned_lens", "unembed_hash": None}  # fmt: skip
    tensors = {f"{i}.{part}": draw(*shape) for i in (0, 1) for part, shape in (("weight", (3, 3)), ("bias", (3,)))}
    own = {
        "format": "workbench.lens",
        "version": 1,
        "base": {"name": "m"},
        "meta": {},
        "sites": ["resid_pre.0", "resid_post.0"],
    }
    return [{"config.json": config | {"workbench": own}, "params.safetensors": to_bytes(tensors)},
            {"config.json": config, "params.pt": torch_bytes(tensors)}]  # fmt: skip


def probe(path: Path, classes: tuple[str, ...] = ("no", "yes")) -> None:
    from probes.probe import Probe

    Probe(
        draw(4, 1), draw(1), classes, Site(1), "label", "logistic", draw(2, 4), torch.arange(3), {"name": "m"}, {}
    ).save(path)


def eraser(path: Path) -> None:
    from probes.erasers import LeaceEraser

    LeaceEraser(draw(4), draw(4, 1), draw(1, 4)).save(path)


def converters(path: Path) -> None:
    from workbench.convert import Converter
    from workbench.converter_files import ConverterSet, save_converters
    from workbench.maps import LinearMap
    from workbench.maps.quality import Quality

    scored = Quality(0.5, 0.5, 0.0, None, 0.1, 0.9, 0.2, 3, 10.0, 50, 3, "few rows")
    maps = LinearMap(draw(3, 4), draw(4), {"a": 1}), LinearMap(draw(4, 3), draw(3), {})
    one = Converter(Site(0), Site(1), *maps, "ridge", 0.1, scored, None)
    save_converters(ConverterSet((one,), {"name": "d"}, {"name": "r"}, "hash", {"match": "nearest"}), path)


def grid(path: Path) -> None:
    from workbench.maps import LinearMap
    from workbench.transport import transport_grid

    from ..transport.streams import write_stream

    with tempfile.TemporaryDirectory() as folder:
        store = write_stream(Path(folder) / "s", {Site(i): draw(60, 3, seed=i) for i in (0, 1)}, 3)
        made_grid = transport_grid(store, folds=2, shards=3)
    made_grid.save(path)
    LinearMap(draw(3, 3), draw(3)).save(path / "operators" / "resid_post.0_to_resid_post.1.safetensors")


def training_checkpoint(state: Any) -> bytes:
    return one_file(lambda file: state.save(file, "key"), ".safetensors")


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()
