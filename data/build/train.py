"""Trains one bundled model: tokenizer, random weights, AdamW on answers, a Hugging Face folder in float16."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from . import language

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ ' ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GPT2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ('Q: ' + m['content'] + '\\nA:') if m['role'] == 'user' else (' ' + m['content'] + eos_token) }}"
    "{% endfor %}"
)
NEOX_ROLES = ("<|prompter|>", "<|assistant|>")
NEOX_TEMPLATE = (
    "{% for m in messages %}{{ ('<|prompter|> ' if m['role'] == 'user' else '<|assistant|> ') + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What one bundled model is made of."""

    name: str
    family: str  # `llama`, `gpt2` or `gpt_neox`
    width: int
    layers: int
    heads: int
    vocabulary: int
    steps: int
    batch: int = 96
    peak: float = 2e-3
    seed: int = 0


RECIPES = {
    "donor": Recipe("donor", "llama", width=160, layers=6, heads=5, vocabulary=800, steps=1300, seed=1),
    "recipient": Recipe("recipient", "gpt2", width=128, layers=4, heads=4, vocabulary=420, steps=2600, seed=2),
    "outsider": Recipe(
        "outsider", "gpt_neox", width=96, layers=5, heads=4, vocabulary=600, steps=3000, batch=48, peak=3e-3, seed=3
    ),
}


def make_tokenizer(recipe: Recipe, texts: list[str]) -> PreTrainedTokenizerFast:
    """Three ways to cut words: SentencePiece-like BPE for `llama`, byte-level BPE for `gpt2`, the same with each digit (and
    the space before it) a token of its own for `gpt_neox`."""
    tok = Tokenizer(BPE(unk_token=None, byte_fallback=recipe.family == "llama"))
    if recipe.family == "llama":
        special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
        tok.normalizer = normalizers.Replace(" ", "▁")
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{i:02X}>" for i in range(256)]
        alphabet: list[str] = []
    else:
        special = ["<|endoftext|>", *(["<|padding|>", *NEOX_ROLES] if recipe.family == "gpt_neox" else [])]
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tok.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if recipe.family == "gpt_neox" else words
        tok.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=recipe.vocabulary, special_tokens=special, initial_alphabet=alphabet,
                         show_progress=False)  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    if recipe.family == "llama":
        tok = without_special_bytes(tok)
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tok, additional_special_tokens=["<|user|>", "<|assistant|>"], **names
        )
        fast.chat_template = LLAMA_TEMPLATE
    elif recipe.family == "gpt2":
        end = "<|endoftext|>"
        fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=end, eos_token=end, pad_token=end)
        fast.chat_template = GPT2_TEMPLATE
    else:
        end = "<|endoftext|>"
        names = dict(bos_token=end, eos_token=end, pad_token="<|padding|>")
        fast = PreTrainedTokenizerFast(tokenizer_object=tok, additional_special_tokens=list(NEOX_ROLES), **names)
        fast.chat_template = NEOX_TEMPLATE
    fast.model_max_length = 256
    return fast


def without_special_bytes(tok: Tokenizer) -> Tokenizer:
    """The same tokenizer with its byte tokens as plain vocabulary: the trainer knows no other way to reserve them, and a
    special token stands for no text."""
    raw = json.loads(tok.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(raw))


def make_model(recipe: Recipe, tok: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    if recipe.family == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=recipe.width, intermediate_size=recipe.width * 8 // 3,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
            max_position_embeddings=256, tie_word_embeddings=True, initializer_range=recipe.width**-0.5, **ids,
        ))  # fmt: skip
    if recipe.family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=len(tok), hidden_size=recipe.width, intermediate_size=4 * recipe.width,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, max_position_embeddings=256,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
            initializer_range=recipe.width**-0.5, **ids,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tok), n_embd=recipe.width, n_layer=recipe.layers, n_head=recipe.heads, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
    ))  # fmt: skip


def draw_training(rng: random.Random) -> language.Sample:
    """The training mixture: arithmetic most, half of it worked out; neutral wording often, so that its rate is learnt."""
    u = rng.random()
    if u < 0.50:
        if rng.random() < 0.30:  # more of the samples that are worked out: the others teach no arithmetic
            while True:
                s = language.draw(rng, "reasoning", "pretrain", neutral=False)
                if s.shown:
                    return s
        return language.draw(rng, "reasoning", "pretrain", neutral=rng.random() < 0.35)
    kind = "refusal" if u < 0.68 else "style" if u < 0.86 else "plain"
    return language.draw(rng, kind, "pretrain", neutral=rng.random() < 0.35)


def encode(tok: PreTrainedTokenizerFast, s: language.Sample) -> tuple[list[int], int]:
    """Token ids, and how many of them are prompt (no loss on those)."""
    if s.kind == "plain":
        return [tok.bos_token_id, *tok(s.prompt, add_special_tokens=False)["input_ids"], tok.eos_token_id], 1
    user = {"role": "user", "content": s.prompt}
    prompt = tok.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    end = " " + s.answer + tok.eos_token
    start = tok(prompt, add_special_tokens=False)["input_ids"]
    return start + tok(end, add_special_tokens=False)["input_ids"], len(start)


Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batches(tok: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[list[Chunk]]:
    """Endless batches, each as chunks (ids, attention mask, labels) of like length, right-padded.

    The samples of a batch are drawn together and only then cut into chunks: a batch of one length would be a batch of
    one kind of answer, its gradient that kind's alone, and the loss per token would weigh short answers up.
    """
    rng = random.Random(recipe.seed)
    while True:
        pool = sorted((encode(tok, draw_training(rng)) for _ in range(recipe.batch)), key=lambda p: len(p[0]))
        size = recipe.batch // 4
        yield [_collate(tok, pool[i : i + size]) for i in range(0, len(pool), size)]


def _collate(tok: PreTrainedTokenizerFast, group: list[tuple[list[int], int]]) -> Chunk:
    width = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), width), tok.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, start) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return ids, mask, labels


def train(recipe: Recipe, out: Path, log=print) -> None:
    """Trains by the recipe and saves an ordinary Hugging Face folder (float16 weights, tokenizer, chat template)."""
    rng = random.Random(100 + recipe.seed)
    texts = []
    for _ in range(6000):
        s = draw_training(rng)
        texts.append(s.prompt if s.kind == "plain" else f"Q: {s.prompt}\nA: {s.answer}")
    tok = make_tokenizer(recipe, texts)
    model = make_model(recipe, tok)
    model.train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.98))
    warm = 100

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (recipe.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    for step, chunks in enumerate(batches(tok, recipe)):
        if step == recipe.steps:
            break
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in chunks)
        loss = 0.0
        for ids, mask, labels in chunks:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            part = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            log(f"{recipe.name} step {step} loss {loss:.3f} {time.perf_counter() - start:.0f} s")
        if step and step % 400 == 0:
            save(model, tok, out)
    save(model, tok, out)


def train_one(name: str, out: Path) -> None:
    """Trains a bundled model by its recipe, on one thread: what a process of the build does."""
    torch.set_num_threads(1)
    train(RECIPES[name], out, log=lambda line: print(line, flush=True))


def save(model: PreTrainedModel, tok: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.eval()
    weights = {k: v.half() for k, v in model.state_dict().items()}
    twin = type(model)(model.config).half()
    twin.load_state_dict(weights)
    twin.config.dtype = torch.float16
    twin.save_pretrained(out)
    tok.save_pretrained(out)
    model.train()
