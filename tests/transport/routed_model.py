"""A GPT-2 whose attention is known by construction: every token attends to the one before it, and to nothing else."""

from __future__ import annotations

from functools import cache

import torch
import transformers as tf

from tests.conftest import VOCABULARY, word_tokenizer
from workbench.models import Model, load

PLACES, SIGNS, LAYERS = 24, 12, 3
CONTENT, BROUGHT = slice(PLACES, PLACES + SIGNS), slice(PLACES + SIGNS, PLACES + 2 * SIGNS)
WIDTH = PLACES + 2 * SIGNS + 2


@cache
def previous_token_model() -> Model:
    """Each state is a place (one of 24 axes) beside a content (12 signs that sum to 0), what was brought from elsewhere,
    and a constant: all of one length and mean, so that the layer norm is one factor. The query of place p is the key of
    p - 1, by so much that the softmax gives all others exactly 0. Every layer brings the content of the token before, its
    signs permuted."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=1, n_positions=PLACES,
                           bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    module = tf.GPT2LMHeadModel(config).eval()
    signs = torch.tensor([1.0, -1.0]).repeat(SIGNS // 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        body = module.transformer
        body.wpe.weight[:, :PLACES] = 5 * torch.eye(PLACES)
        body.wte.weight[:, CONTENT] = torch.stack([signs[torch.randperm(SIGNS)] for _ in range(VOCABULARY)])
        body.ln_f.weight.fill_(1)
        for block in body.h:
            block.ln_1.weight.fill_(1)
            block.ln_2.weight.fill_(1)
            to_query, to_key, to_value = block.attn.c_attn.weight.split(WIDTH, 1)  # [d, d] each
            to_query[range(1, PLACES), range(PLACES - 1)] = 200.0
            to_query[0, 0] = 200.0  # the first has itself alone
            to_key[range(PLACES), range(PLACES)] = 1.0
            to_value[CONTENT, CONTENT] = torch.eye(SIGNS)
            block.attn.c_proj.weight[CONTENT, BROUGHT] = torch.eye(SIGNS).roll(5, 0)
            block.mlp.c_proj.bias[-2:] = torch.tensor([0.5, -0.5])
    return load(module, tokenizer=word_tokenizer(), prove=False)


def word_prompts(n: int, length: int, seed: int = 0) -> list[str]:
    """Texts of words drawn independently."""
    drawn = torch.randint(0, 170, (n, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]
