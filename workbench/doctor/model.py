"""A model: it is found, loads, has its blocks where they are looked for, and the tokenizer and template of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UserError
from .check import Check, failed

if TYPE_CHECKING:
    from ..models import Model


def look_at_model(source: str) -> tuple[Model | None, list[Check]]:
    """The model, where it loads and its sites are proved, and what was found on the way."""
    from ..models import load

    try:
        model = load(source, prove=False)
    except UserError as err:
        return None, [failed("model", err, "give a model folder or a hub id of a causal language model")]
    size = f"{model.n_layers} layers, width {model.width}, {model.parameters:,} parameters"
    dtype = str(model.dtype).removeprefix("torch.")
    sites = _sites(model)
    checks = [
        Check("OK", "model", f"{model.name}: {model.family}, {size}, {dtype} on {model.device}"),
        sites,
        *_tokenizer(model),
        Check("OK", "fingerprint", f"{model.fingerprint_id} (weights {model.fingerprint['weights'][:12]})"),
    ]
    return (model if sites.status == "OK" else None), checks


def _sites(model: Model) -> Check:
    from ..anatomy import INNER

    try:
        model.prove(range(model.n_layers))
    except UserError as err:
        return failed("sites", err, "pass blocks='path.to.the.ModuleList' to load")
    proved = f"resid_post.0 to resid_post.{model.n_layers - 1} proved at {model.blocks_path}"
    inner = [f"{p} not everywhere ({model.missing[p]})" if p in model.missing else p for p in INNER]
    return Check("OK", "sites", f"{proved}: what is written is read back and changes the logits; so {', '.join(inner)}")


def _tokenizer(model: Model) -> Iterator[Check]:
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None):
        yield Check("OK", "chat template", "yes: chats are put through it")
    else:
        yield Check("WARN", "chat template", "no: a chat of one user turn is read as plain text",
                    "use an instruct model for chats")  # fmt: skip
    rows = int(model.module.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        yield Check("FAIL", "tokenizer", f"it has {len(tokenizer)} tokens and the model {rows} embeddings",
                    "give the tokenizer that belongs to the model")  # fmt: skip
    else:
        bos = "no BOS" if tokenizer.bos_token_id is None else f"BOS {tokenizer.bos_token!r}"
        yield Check("OK", "tokenizer", f"{len(tokenizer)} tokens, {bos}, {len(model.end_ids)} end tokens")
