"""Small random models of every supported family, made from their configs: no test needs a download."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import no_pickle

no_pickle.install()  # before what follows could hold on to the real ones
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WORKBENCH_PROGRESS", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # there are as many workers as cores: with a second thread each, all spend their time waiting for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers as tf  # noqa: E402

from workbench.adapters import train  # noqa: E402
from workbench.engines import Engine, open_engine  # noqa: E402
from workbench.engines.cluster import connected  # noqa: E402
from workbench.models import Model, load  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VOCABULARY, WIDTH, LAYERS = 199, 48, 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_COMMON = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
               max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
_GATED = dict(**_COMMON, intermediate_size=96, num_key_value_heads=2, head_dim=12)
FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GATED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GATED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GATED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GATED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GATED, query_pre_attn_scalar=12)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GATED, query_pre_attn_scalar=12)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{**_GATED, "pad_token_id": 0})),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=0)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_COMMON, intermediate_size=96)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=WIDTH)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**{
        k: v for k, v in _COMMON.items() if k != "max_position_embeddings"}, alibi=False)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**{k: v for k, v in _GATED.items() if k != "head_dim"})),
}  # fmt: skip

_HEADS = dict(vocab_size=VOCABULARY, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_FALCON = {k: v for k, v in _COMMON.items() if k != "max_position_embeddings"} | dict(alibi=False)
_PLAIN = {k: v for k, v in _GATED.items() if k != "head_dim"}
_EXPERTS = dict(**_PLAIN, num_experts_per_tok=2)
_STABLE = dict(**_PLAIN, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))


def _wrapped(config: Any, text: Any, module: Any, **more: Any) -> Any:
    """A multimodal wrapper with a small text part and a smaller vision part."""
    vision = tf.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=28, patch_size=14)  # fmt: skip
    return module(config(text_config=text, vision_config=vision, **more))


MORE_FAMILIES: dict[str, Any] = {
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**_HEADS, hidden_size=WIDTH, n_layer=LAYERS)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(
        **_HEADS, n_embd=WIDTH, n_layer=LAYERS, n_positions=128, rotary_dim=8)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_PLAIN)),
    "falcon_new": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_sequential": lambda: tf.FalconForCausalLM(tf.FalconConfig(
        **_FALCON, parallel_attn=False, multi_query=False)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GATED)),
    "gemma3_wrapped": lambda: _wrapped(
        tf.Gemma3Config, dict(**_GATED, query_pre_attn_scalar=12), tf.Gemma3ForConditionalGeneration,
        mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6, image_token_index=198),
    "gpt_neox_sequential": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(
        **_COMMON, intermediate_size=96, use_parallel_residual=False)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(
        **_HEADS, n_embd=WIDTH, n_layer=LAYERS, n_positions=128, rotary_dim=8)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(
        **_PLAIN, residual_multiplier=0.22)),
    "llava": lambda: _wrapped(
        tf.LlavaConfig, tf.LlamaConfig(**_GATED), tf.LlavaForConditionalGeneration, image_token_index=198),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_heads=4, n_layers=LAYERS, max_seq_len=128, expansion_ratio=2)),
    "opt_post_norm": lambda: tf.OPTForCausalLM(tf.OPTConfig(
        **_COMMON, ffn_dim=96, word_embed_proj_dim=WIDTH, do_layer_norm_before=False)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_COMMON, intermediate_size=96)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(
        **_EXPERTS, num_experts=4, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, decoder_sparse_step=2)),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_STABLE)),
    "stablelm_parallel": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_STABLE, use_parallel_residual=True)),
}  # fmt: skip
"""further families, for the tests of sites alone: each family multiplies the time of what runs on every one"""


@cache
def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer: `w0` to `w179` and a few others, BOS in front, a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(VOCABULARY - 6))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                     unk_token="<unk>")  # fmt: skip
    tok.chat_template = TEMPLATE
    return tok


def make_module(family: str, seed: int = 0) -> Any:
    """A random model of a family; weights are enlarged so that every part matters."""
    torch.manual_seed(seed)
    module = (FAMILIES | MORE_FAMILIES)[family]()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.mul_(4.0) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p)) if "norm" in name or "ln" in name else None
    return module.eval()


def make_model(family: str, seed: int = 0) -> Model:
    return load(make_module(family, seed), tokenizer=word_tokenizer())


@pytest.fixture(autouse=True)
def nothing_is_unpickled() -> Iterator[None]:
    """Fails a test in which something pickled was loaded, also where the code under test swallowed the error."""
    before = len(no_pickle.seen)
    yield
    assert no_pickle.seen[before:] == []


@pytest.fixture(params=sorted(FAMILIES))
def family_model(request: pytest.FixtureRequest) -> Model:
    """A proved random model, once for each family."""
    return make_model(request.param)


@pytest.fixture
def llama() -> Model:
    return make_model("llama")


@pytest.fixture
def gpt2() -> Model:
    return make_model("gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def small_model(request: pytest.FixtureRequest) -> Model:
    """A Llama (rotary positions) and a GPT-2 (learned positions, where padding can go wrong)."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public fixtures; skips where it is not beside the project."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip("the shared fixtures are not beside the project")
    return SHARED / "fixtures"


def save_folder(module: Any, path: Path) -> Path:
    """Saves a module and the word tokenizer as an ordinary Hugging Face folder."""
    module.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def interrupts_are_heard() -> Iterator[None]:
    """Python's own handler: a run that was started in the background of a script has SIGINT ignored, and so its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def ctrl_c_in_training(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """A training inside is sent a Ctrl-C when it has made so many steps.

    Python's own handler is in place then: what was started in the background of a script has SIGINT ignored.
    """
    step, before = train._step, signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(state: Any, *rest: Any) -> None:
        step(state, *rest)
        if state.step == after:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in a folder, for workers to load."""
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("engines") / "llama")


@pytest.fixture(scope="session")
def saved_model(model_folder: Path) -> Model:
    return load(model_folder)


@pytest.fixture(scope="session")
def two_workers() -> Iterator[Engine]:
    """Ray with two workers on a cluster of this machine: one for all tests, which are marked `xdist_group("ray")`.

    The cluster says that it has three CPUs, so that a test may ask for a third.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with connected(None, n_cpus=3), open_engine("ray", workers=2) as engine:
        yield engine
