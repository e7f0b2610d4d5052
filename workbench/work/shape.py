"""ModelShape: what of a model decides how much work it does, read off its configuration; no weights are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..sites import Site, find_blocks, text_config

if TYPE_CHECKING:
    from torch import nn

    from ..models import Model

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class BlockShape:
    """One block: the numbers of weights it holds and uses, and what its attention takes for each key."""

    held: int
    """numbers of all its parameters"""
    active: float
    """numbers of the matrices that one token is multiplied with: of a mixture of experts, those that it is sent to"""
    scores: int
    """width of the queries of all heads, and of the values: what one key costs one token, in multiply-adds"""
    cached: int
    """numbers that one token leaves in the cache: keys and values of all key heads"""
    window: int | None = None
    """how far back its attention sees, where it does not see all"""

    def keys(self, length: float, first: float = 0) -> float:
        """The mean number of keys that tokens at `first` .. length - 1 see: causal, and within the window.

        >>> BlockShape(0, 0, 0, 0).keys(4), BlockShape(0, 0, 0, 0, window=2).keys(4), BlockShape(0, 0, 0, 0).keys(4, 3)
        (2.5, 1.75, 4.0)
        """
        return (_seen(length, self.window) - _seen(first, self.window)) / max(length - first, 1)

    def flops(self, keys: float) -> float:
        """FLOPs of one token that sees so many keys: two for each weight it meets, and for each number of a key or value."""
        return 2.0 * (self.active + self.scores * keys)


@dataclass(frozen=True)
class ModelShape:
    """What decides a model's work: its blocks, its width, its head. Made by `of_config`, `of` or `open_shape`.

    >>> config = transformers.AutoConfig.from_pretrained("meta-llama/Llama-3.1-8B")  # doctest: +SKIP
    >>> ModelShape.of_config(config).forward(2048).flops / 1e12                      # doctest: +SKIP
    """

    name: str
    width: int
    vocabulary: int
    blocks: tuple[BlockShape, ...]
    parameters: int
    """of the whole model, a tied head counted once"""
    mlp_act: int
    """width of the input of the MLP's down projection; 0 where the configuration does not say"""
    dtype: str
    context: int
    """the longest sequence that it was made for"""

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def head(self) -> int:
        """Numbers of the matrix that gives the logits."""
        return self.width * self.vocabulary

    def bytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights, in their own dtype unless another is given."""
        return self.parameters * ITEMSIZE[dtype or self.dtype]

    def layers(self, sites: Sequence[Site | str | int] | None = None) -> list[Site]:
        """The sites that a profile would keep: every resid_post unless given; UserError for one that is not there."""
        return [Site.parse(s, self.n_layers) for s in (range(self.n_layers) if sites is None else sites)]

    def width_of(self, site: Site) -> int:
        """The width of what passes a site, as `Model.width_of` has it."""
        if site.point != "mlp_act":
            return self.width
        if not self.mlp_act:
            raise UserError(f"the configuration of {self.name} does not say how wide {site} is; plan with another site")
        return self.mlp_act

    @classmethod
    def of(cls, model: Model) -> ModelShape:
        """The shape of a loaded model; UserError where its configuration does not say its sizes."""
        return _shape(model.module, [model.block(layer) for layer in range(model.n_layers)], model.name)

    @classmethod
    def of_config(cls, config: Any, name: str = "") -> ModelShape:
        """The shape of a transformers configuration: its modules are made without memory for any weight."""
        import torch
        from transformers import AutoModelForCausalLM

        text = config.get_text_config(decoder=True)
        try:
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(text)
        except ValueError as err:
            raise UserError(f"no work can be counted for a {text.model_type}: transformers knows no causal language "
                            "model of that type") from err  # fmt: skip
        return _shape(
            module, find_blocks(module)[1], name or str(getattr(config, "name_or_path", "") or text.model_type)
        )

    @classmethod
    def of_numbers(cls, name: str, numbers: Mapping[str, Any]) -> ModelShape:
        """The shape of a configuration given as numbers, `model_type` among them, as config.json holds them."""
        from transformers import AutoConfig

        given = dict(numbers)
        return cls.of_config(AutoConfig.for_model(given.pop("model_type"), **given), name)


def open_shape(source: str | Path, revision: str | None = None) -> ModelShape:
    """The shape of a model by its hub id, folder or bundled name: its config.json is read, and none of its weights.

    Raises UserError as `load` does for a model that is not there.

    >>> open_shape("bundled:donor").n_layers  # doctest: +SKIP
    """
    from ..checkpoints import folder_of, open_config

    folder = folder_of(str(source), revision, weights=False)
    return ModelShape.of_config(open_config(source, folder), str(source))


def _seen(length: float, window: int | None) -> float:
    """Pairs of a token and a key before or at it."""
    near = length if window is None else min(length, window)
    return near * (near + 1) / 2 + (length - near) * near


def _shape(module: nn.Module, found: Iterable[nn.Module], name: str) -> ModelShape:
    try:
        return _read_shape(module, found, name)
    except (AttributeError, TypeError, IndexError, KeyError, ValueError) as err:  # whoever wrote the configuration
        raise UserError(f"no work can be counted for {name}: its configuration does not say its sizes as others do "
                        f"({type(err).__name__}: {err})") from err  # fmt: skip


def _read_shape(module: nn.Module, found: Iterable[nn.Module], name: str) -> ModelShape:
    config: Any = text_config(module)
    routed = _first(config, PER_TOKEN) / max(_first(config, EXPERTS), 1) or 1.0
    blocks = tuple(_block(block, config, layer, routed) for layer, block in enumerate(found))
    inner = _first(config, ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"))
    if not inner and hasattr(config, "n_inner"):  # GPT-2 and its kin: None stands for four times the width
        inner = 4 * int(config.hidden_size)
    dtype = str(getattr(config, "dtype", None) or next(module.parameters()).dtype).removeprefix("torch.")
    return ModelShape(
        name, int(config.hidden_size), int(config.vocab_size), blocks, sum(p.numel() for p in module.parameters()), inner,
        dtype if dtype in ITEMSIZE else "float32", int(getattr(config, "max_position_embeddings", None) or 1 << 30),
    )  # fmt: skip


def _block(block: nn.Module, config: Any, layer: int, routed: float) -> BlockShape:
    # experts are single matrices in a list, or one tensor of three dimensions; either way each token meets a share of them
    active = sum(
        p.numel() * (routed if ".experts." in f".{path}" else 1.0) for path, p in block.named_parameters() if p.ndim > 1
    )
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    each = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    query, value = (int(getattr(config, key, None) or each) for key in ("qk_head_dim", "v_head_dim"))
    kinds = getattr(config, "layer_types", None)
    window = int(getattr(config, "sliding_window", None) or 0)
    slides = window > 0 and (
        kinds[layer] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    )
    return BlockShape(
        sum(p.numel() for p in block.parameters()), active, heads * (query + value),
        _key_heads(config, heads) * (query + value), window if slides else None,
    )  # fmt: skip


def _key_heads(config: Any, heads: int) -> int:
    """Heads of keys and values: fewer than those of queries where these share them (GQA), or one (Falcon 7B, MPT)."""
    attention = getattr(config, "attn_config", None)
    given = getattr(attention, "kv_n_heads", None) or _first(config, ("num_key_value_heads", "num_kv_heads"))
    new = getattr(config, "new_decoder_architecture", None)
    if new is not None:  # Falcon, which caches the keys that its heads share once for each head
        return 1 if config.multi_query and not new else heads
    return int(given) if given else heads


def _first(config: Any, names: Sequence[str]) -> int:
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0)
