"""A language model with its tokenizer, its sites proved, and its fingerprint."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import anatomy, generation
from .anatomy import proof
from .backends import NAMES, Backend, held_by, open_backend, torch_hooks
from .backends.hooks import HooksBackend
from .checkpoints import folder_of, open_config, open_skeleton, open_tokenizer, open_weights, place
from .errors import UserError
from .fingerprint import fingerprint_of
from .hashes import short_hash
from .sites import Site, find_blocks, plain_module, text_config

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.blend import Blend
    from .engines import Engine

log = logging.getLogger("workbench")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Model:
    """A Hugging Face causal language model, ready to be read and edited. Made by `load`.

    Attributes: `module`, `tokenizer`, `name` (what it was loaded from), `folder` (its local files, where known),
    `decoder` (the part that is not the LM head), `blocks_path`, `backend` (how it is read and edited), `engine` (who runs
    its batches: see `replicas.spread_over`; None: itself), `edited` (how many edits are open).
    """

    def __init__(self, module: Any, tokenizer: Any, name: str, folder: Path | None = None, revision: str = "",
                 blocks: str | None = None, backend: Backend | None = None, elsewhere: str = "") -> None:  # fmt: skip
        self.module, self.tokenizer, self.name, self.folder, self.revision = module, tokenizer, name, folder, revision
        self.backend: Backend = backend or HooksBackend()
        self.engine: Engine | None = None
        self.edited = 0
        self.blocks_path, self._blocks = find_blocks(module, blocks)
        self.decoder: nn.Module = getattr(module, "get_decoder", lambda: None)() or module
        self._elsewhere = elsewhere
        self._accepts = set(inspect.signature(self.decoder.forward).parameters)
        module.eval()

    def __repr__(self) -> str:
        of = "" if self.backend.name == NAMES[0] else f", {self.backend.name}"
        size = f"{self.n_layers} layers, width {self.width}"
        return f"Model({self.name!r}, {self.family}, {size}, {self.dtype}, {self.device}{of})"

    @property
    def family(self) -> str:
        return str(text_config(self.module).model_type)

    @property
    def n_layers(self) -> int:
        return len(self._blocks)

    @property
    def width(self) -> int:
        return int(text_config(self.module).hidden_size)

    @property
    def device(self) -> torch.device:
        embeddings = self.module.get_input_embeddings()
        if embeddings.weight.is_meta:  # offloaded by accelerate, whose hook brings the weights where they are needed,
            # or on another machine, to which ids are sent from here
            hook = getattr(embeddings, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or self._elsewhere or "cpu")
        return embeddings.weight.device

    @property
    def is_skeleton(self) -> bool:
        """Whether it was loaded without its weights, and so cannot run."""
        return bool(self._elsewhere)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def pad_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer: the generation config's, the config's, the tokenizer's."""
        found: list[int] = []
        for holder in (getattr(self.module, "generation_config", None), text_config(self.module), self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            found += value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(found))

    @property
    def max_length(self) -> int:
        return int(getattr(text_config(self.module), "max_position_embeddings", None) or 1 << 30)

    def block(self, layer: int) -> nn.Module:
        return self._blocks[layer]

    def width_of(self, site: Site) -> int:
        """The width of the states at a site: d, or h at `mlp_act`. Raises UserError for a site that is not there."""
        if site.point != "mlp_act":
            return self.width
        anatomy.check(self, [site])
        return self.anatomy[site.layer].act_width

    @cached_property
    def anatomy(self) -> list[anatomy.Anatomy]:
        """The parts of each block behind the points inside it, from one short pass when they are first needed."""
        return self.backend.anatomy(self)

    def read(
        self, sites: Sequence[Site | str | int] | Site | str | int, take: torch_hooks.Take | None = None
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        """What passes `sites` in each forward pass inside the block; see `backends.Backend.read`.

        sites: `Site`s or their names, or one of them; what is read is found under its `Site`.
        """
        several = [sites] if isinstance(sites, (Site, str, int)) else sites
        return self.backend.read(self, [self.site(site) for site in several], take)

    def edit(
        self, edits: Mapping[Site, torch_hooks.Edit], prompt_lengths: Int[Tensor, " b"] | Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Replaces the states h at each site by `fn(h, where)` inside the block; see `backends.torch_hooks.edit`."""
        return self._counted(self.backend.edit(self, edits, prompt_lengths))

    @contextmanager
    def _counted(self, edit: AbstractContextManager[None]) -> Iterator[None]:
        with edit:
            self.edited += 1
            try:
                yield
            finally:
                self.edited -= 1

    @property
    def missing(self) -> dict[str, str]:
        """The points that some layers do not have, and why: {"resid_mid": reason}."""
        return {point: why for parts in reversed(self.anatomy) for point, why in parts.missing.items()}

    def site(self, text: str | int | Site) -> Site:
        """Reads a site and checks that this model has it."""
        return Site.parse(text, self.n_layers)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the model is; see `fingerprint.fingerprint_of`. The same on every backend."""
        return fingerprint_of(self)

    @property
    def fingerprint_id(self) -> str:
        """A short hash of what matters of the fingerprint: not of where the files happened to lie."""
        return short_hash({k: v for k, v in self.fingerprint.items() if k not in ("name", "revision")})

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """position_ids for left-padded batches: without them learned positions are wrong.

        mask: as it was given, on the host most often: asked on a GPU it would wait for all that runs there.
        """
        if "position_ids" not in self._accepts or bool(mask[:, 0].all()):
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(self.device)}

    def _moved(self, values: Tensor) -> Tensor:
        """On the model's device; without waiting for it where that is safe."""
        return values.to(self.device, non_blocking=values.is_pinned())

    def run(self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], stop_after: int | None = None) -> None:
        """A forward pass without the LM head, ending after block `stop_after`; for what hooks read on the way."""
        options = {"input_ids": self._moved(ids), "attention_mask": self._moved(mask), "use_cache": False,
                   **self._positions(mask)}  # fmt: skip
        self.backend.call(self, "decoder", options, self.n_layers - 1 if stop_after is None else stop_after)

    def logits(
        self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], last_only: bool = False
    ) -> Float[Tensor, "b kept v"]:
        """The logits of a batch, padded on either side; of its last column alone with `last_only`."""
        keep = {"logits_to_keep": 1} if last_only and "logits_to_keep" in self._head_accepts else {}
        options = {"input_ids": self._moved(ids), "attention_mask": self._moved(mask), "use_cache": False,
                   **self._positions(mask), **keep}  # fmt: skip
        out = self.backend.call(self, "module", options).logits
        return out[:, -1:] if last_only else out

    @cached_property
    def _head_accepts(self) -> set[str]:
        return set(inspect.signature(self.module.forward).parameters)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        adapter: Adapter | Blend | None = None,
        seed: int = 0,
        desc: str = "generating",
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers to `prompts` (a PromptSet, texts or chats), in their order, special tokens left out.

        Greedy unless `options` say otherwise (any argument of a Hugging Face GenerationConfig; `generation.Decoding` has
        the usual ones). Prompts are batched by length and padded left; greedy answers do not depend on `batch_size` but
        for float noise. Sampling draws from torch's generator, which each batch seeds anew, with `seed` and its number.
        With `on_text` the prompts are answered one by one, and it is called with each piece of text as it comes.
        """
        return generation.generate(self, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, adapters=[adapter],
                                   seed=seed, desc=desc, on_text=on_text, **options)[0]  # fmt: skip

    def generate_each(
        self,
        prompts: Any,
        adapters: Sequence[Adapter | Blend | None],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        desc: str = "generating",
        **options: Any,
    ) -> list[list[str]]:
        """`generate` under each of several adapters, all batches at once: what replicas share out best."""
        return generation.generate(self, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                                   adapters=list(adapters), seed=seed, desc=desc, on_text=None, **options)  # fmt: skip

    def prove(self, layers: Sequence[int] | None = None) -> None:
        """Proves the sites in a few passes of 16 tokens; at `layers` (first, middle and last unless given) that writing
        changes the logits. Raises UserError naming the site that fails; see `proof.prove`."""
        proof.prove(self, layers)


def load(
    source: str | Path | Any,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    blocks: str | None = None,
    prove: bool = True,
    backend: str = "hooks",
    remote: bool | str = False,
    weights: bool = True,
) -> Model:
    """Loads a model: a hub id, a local folder, `bundled:donor`, `bundled:recipient`, or one that is loaded already.

    source: of loaded ones, a PreTrainedModel, a TransformerLens `TransformerBridge`, or an nnsight `TransformersModel`.
    dtype: `auto` follows the checkpoint (float16 becomes float32 on a CPU), or float32, float16, bfloat16.
    device: `auto` takes the GPU, spreads over several by accelerate's device map, or the CPU; or `cpu`, `cuda:1`, `map`.
    blocks: the path of the ModuleList of blocks, for a family that is not recognised.
    backend: how it is read and edited: `hooks`, `transformer-lens` or `nnsight` (see `backends`). A PreTrainedModel is
        copied for TransformerLens, which changes the module that it wraps; nnsight shares it.
    remote: with nnsight, run on NDIF, the weights staying there; `"local"` plays a remote run on this machine.
    weights: False leaves them out, for a process that plans what others run (`workbench.engines`): nothing is proved, and
        `device` says where those others will have it.
    Weights are read from safetensors only; no remote code is run. Raises UserError naming what cannot be loaded.
    """
    if backend not in NAMES:
        raise UserError(f"unknown backend {backend!r}; allowed: {', '.join(NAMES)}")
    if remote:
        return _load_remote(source, tokenizer, revision, backend, remote)
    if not isinstance(source, (str, Path)):
        model = _adopt(source, tokenizer, blocks, backend)
        if prove:
            model.prove()
        return model
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    folder = folder_of(str(source), revision)
    config, tok = open_config(source, folder), tokenizer or open_tokenizer(source, folder)
    placed, device_map = (
        place(device) if weights else ("cuda" if device == "map" else device.replace("auto", "cpu"), None)
    )
    wanted = DTYPES.get(dtype) or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    if placed == "cpu" and wanted == torch.float16 and dtype == "auto":
        wanted = torch.float32  # half precision is slow and lossy on a CPU
    if not weights:
        return Model(open_skeleton(source, config, wanted), tok, str(source), folder, revision or "", blocks,
                     elsewhere=placed)  # fmt: skip
    # straight to its place: by way of the host's memory a large model would need it twice
    module = open_weights(source, folder, wanted, device_map or (None if placed == "cpu" else placed))
    model = Model(module, tok, str(source), folder, revision or "", blocks, open_backend(backend, module, tok))
    if prove:
        model.prove()
    log.info("loaded %s", model)
    return model


def _adopt(source: Any, tokenizer: Any, blocks: str | None, backend: str) -> Model:
    """A Model of something that was loaded elsewhere."""
    held = held_by(source)
    if held is not None:
        module, own, made = held
        if backend not in (NAMES[0], made.name):
            raise UserError(
                f"this {type(source).__name__} is read and edited with backend={made.name!r}; leave backend out"
            )
    else:
        if tokenizer is None:
            raise UserError("a loaded model needs its tokenizer: load(model, tokenizer=tokenizer)")
        module, own = plain_module(source), None
        if backend == "transformer-lens":
            module = copy.deepcopy(module)
        made = open_backend(backend, module, tokenizer)
    name = str(getattr(module, "name_or_path", "") or type(module).__name__)
    return Model(module, tokenizer or own, name, blocks=blocks, backend=made)


def _load_remote(source: Any, tokenizer: Any, revision: str | None, backend: str, remote: bool | str) -> Model:
    """A Model whose weights are elsewhere; nothing is proved, since every pass is a job there."""
    if backend != "nnsight" or not isinstance(source, (str, Path)):
        raise UserError(
            "remote runs are nnsight's and take a hub id: load('owner/name', backend='nnsight', remote=True)"
        )
    from .backends.ndif import NdifBackend, remote_model

    folder = Path(source).expanduser() if Path(source).expanduser().is_dir() else None
    tokenizer = tokenizer or (open_tokenizer(source, folder) if folder else None)
    held = remote_model(str(source), tokenizer, revision, remote)
    made = NdifBackend(held, remote)
    return Model(held._module, held.tokenizer, str(source), folder, revision or "", backend=made)
