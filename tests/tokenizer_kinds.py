"""Small tokenizers of every kind that real models have, trained here: byte-level, SentencePiece, WordPiece."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["hello world  the cat sat on the mat", "Hello, World! it's a test", "naïve café", "日本語 のテキスト", "👩‍👩‍👧 😀😃",
          "  indented\n\tcode\n", "user assistant system", "שלום مرحبا"]  # fmt: skip
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPPING = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
KINDS = ("byte-level", "byte-level trimmed", "sentencepiece bpe", "llama 2", "unigram", "unigram nfkc", "wordpiece")


@cache
def tokenizer(kind: str, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    core = {"byte": _byte_level, "sent": _sentencepiece, "llam": _sentencepiece, "unig": _unigram, "word": _wordpiece}[
        kind[:4]
    ](kind)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    found.chat_template = template
    return found


def _byte_level(kind: str) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=SPECIAL, show_progress=False)  # fmt: skip
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets="trimmed" in kind)
    return core


def _sentencepiece(kind: str) -> Any:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "llama 2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    core.train_from_iterator(["hello world  the cat sat on the mat", "naïve café", "user"], trainer)
    return core


def _unigram(kind: str) -> Any:
    letters = [(c, -4.0) for c in "abcdefghijklmnopqrstuvwxyzé.,!:"]
    words = [("▁hello", -3.0), ("▁the", -3.0), ("▁▁", -3.0), ("fi", -3.0), ("at", -3.0), ("日本", -3.0)]
    pieces = [*((s, 0.0) for s in SPECIAL), ("▁", -2.5), *letters, *words, *((b, -10.0) for b in BYTES)]
    core = Tokenizer(models.Unigram(pieces, 0, True))
    if "nfkc" in kind:
        core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.decoder = decoders.Metaspace()
    return core


def _wordpiece(kind: str) -> Any:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIAL,
                                                               show_progress=False))  # fmt: skip
    return core
