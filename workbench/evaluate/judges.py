"""Models that judge answers: a text classifier, and a language model that replies yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..progress import progress

if TYPE_CHECKING:
    from ..models import Model


def label_probabilities(
    model: str, texts: Sequence[str], label: str, *, batch_size: int = 32, device: str = "auto"
) -> list[float]:
    """The probability that a text classifier gives `label` for each text; longer ones are cut to what it reads.

    Raises UserError for a model that cannot be loaded or is no classifier, and for a label that it does not have.
    """
    classify = _classifier(model, device)
    labels = list(classify.model.config.id2label.values())
    if label not in labels:
        raise UserError(f"classifier {model} has no label {label!r}; allowed: {', '.join(map(str, labels))}")
    found: list[float] = []
    for start in progress(range(0, len(texts), batch_size), desc="classifying", unit="batch"):
        given = classify(list(texts[start : start + batch_size]), top_k=None, truncation=True, batch_size=batch_size)
        found += [next(float(one["score"]) for one in scores if one["label"] == label) for scores in given]
    return found


def reply_log_odds(
    model: str, texts: Sequence[str], yes: Sequence[str], no: Sequence[str], *, batch_size: int = 16,
    dtype: str = "auto", device: str = "auto",
) -> list[float]:  # fmt: skip
    """log p(yes) - log p(no) at the first token of a model's reply to each text, in nats.

    p(yes) is the sum over the first tokens of the words in `yes`. Texts go through the model's chat template, and one
    too long loses tokens from its left. Raises UserError where a yes and a no begin with the same token.
    """
    import torch

    from ..prompts import PromptSet, encode, opener_ids, pad

    if not texts:
        return []
    held = _language_model(model, dtype, device)
    prompts = PromptSet.load(list(texts))
    sides = [opener_ids(words, held.tokenizer, prompts[0]) for words in (yes, no)]
    if set(sides[0]) & set(sides[1]):
        raise UserError(f"a yes of {list(yes)} and a no of {list(no)} begin with the same token of {model}; choose words "
                        "that it tells apart by their first token")  # fmt: skip
    encoded = encode(prompts, held.tokenizer, max_length=held.max_length)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    found = [0.0] * len(encoded)
    for start in progress(range(0, len(order), batch_size), desc="judging", unit="batch"):
        rows = order[start : start + batch_size]
        ids, mask = pad([encoded[i] for i in rows], held.pad_id, "left")
        with torch.inference_mode():
            last = held.logits(ids, mask, last_only=True)[:, -1].double()
        odds = last[:, sides[0]].logsumexp(1) - last[:, sides[1]].logsumexp(1)
        for i, value in zip(rows, odds.tolist(), strict=True):
            found[i] = value
    return found


@lru_cache(maxsize=1)
def _language_model(model: str, dtype: str, device: str) -> Model:
    """The judge stays loaded: a run asks it once for every arm."""
    from ..models import load

    return load(model, dtype=dtype, device=device, prove=False)


@lru_cache(maxsize=1)
def _classifier(model: str, device: str) -> Any:
    """A pipeline around a text classifier, from safetensors and without code of its own."""
    from transformers import AutoModelForSequenceClassification, pipeline

    from ..checkpoints import folder_of, open_config, open_tokenizer, place

    folder = folder_of(model, None)
    config, tokenizer = open_config(model, folder), open_tokenizer(model, folder)
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        kind = ", ".join(config.architectures or ()) or "of no named kind"
        raise UserError(f"{model} is no text classifier but {kind}; its head would be random numbers")
    try:
        module = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    except Exception as err:  # each family fails in its own way; each error means the same to the user
        raise UserError(f"cannot load the classifier {model}: {' '.join(str(err).split())[:200]}; only safetensors are "
                        "read") from err  # fmt: skip
    limit = getattr(config, "max_position_embeddings", None)
    if limit and tokenizer.model_max_length > limit:  # a tokenizer without a limit would let too long texts through
        tokenizer.model_max_length = limit
    return pipeline("text-classification", model=module.eval(), tokenizer=tokenizer, device=place(device)[0])
