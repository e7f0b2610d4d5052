"""What a profile costs beside a plain forward pass of the same batches, and beside other tools; and its memory."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from tests.conftest import word_tokenizer
from workbench.models import Model, load
from workbench.profile import profile_model
from workbench.profile.plan import make_plan
from workbench.prompts import PromptSet
from workbench.rendering import pad

from .timing import in_turns, ratios, spread

ROOT = Path(__file__).resolve().parents[2]


def gpt2_small(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A random model of GPT-2 small's shape: 124M parameters, 12 layers, 768 wide."""
    torch.manual_seed(0)
    config = tf.GPT2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return load(tf.GPT2LMHeadModel(config).to(device=device, dtype=dtype).eval(), tokenizer=word_tokenizer())


def llama_8b() -> Model:
    """A random model of Llama 3.1 8B's shape on the GPU, bfloat16."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            module = tf.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return load(module.eval(), tokenizer=word_tokenizer())


def large_speed() -> dict[str, Any]:
    """`speed` for the 8B shape on a GPU, with batches of a size that keeps it busy; rows are stored in bfloat16."""
    return speed(
        llama_8b(), n_prompts=256, batch_tokens=16384, shortest=128, longest=512, layers=(32,), dtype="bfloat16"
    )


def random_prompts(n: int, shortest: int, longest: int, seed: int = 0) -> PromptSet:
    """Plain texts of the test tokenizer's words, their lengths drawn evenly."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, n)
    return PromptSet.load([{"text": " ".join(f"w{w}" for w in rng.integers(0, 190, k))} for k in lengths])


def batches_of(model: Model, prompts: PromptSet, batch_tokens: int) -> list[dict[str, torch.Tensor]]:
    """The padded batches that a profile of all tokens runs."""
    plan = make_plan(model, prompts, tokens="all", batch_tokens=batch_tokens)
    found = []
    for block in plan.blocks:
        for batch in plan.batches(block):
            ids, mask = pad([plan.spool.ids(i).tolist() for i in batch], model.pad_id, "right")
            found.append({"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)})
    return found


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each way, one after another in turn, after one run of each to warm up."""
    return {name: statistics.median(values) for name, values in in_turns(ways, repeats).items()}


def speed(
    model: Model | None = None, *, n_prompts: int = 48, batch_tokens: int = 2048, repeats: int = 5, others: bool = False,
    layers: tuple[int, ...] = (12, 4), tokens: tuple[str, ...] = ("all", "last"), shortest: int = 32, longest: int = 256,
    dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second of profiles (of all layers, of the first four) against plain `model(**batch)`, head and all.

    others: beside it Hugging Face's output_hidden_states, TransformerLens's run_with_cache and nnsight's trace, each
    keeping resid_post of every layer for every token of a batch, and nothing written.
    Returns {"tokens": real tokens, "padding": share, "plain": tokens/s, "ratio": {way: tokens/s over the plain}}.
    """
    model = model or gpt2_small()
    prompts = random_prompts(n_prompts, shortest, longest)
    batches = batches_of(model, prompts, batch_tokens)
    n_tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.module(**batch)

    ways: dict[str, Callable[[], Any]] = {"plain": plain}
    for count in layers:
        for policy in tokens:
            options = {"sites": list(range(count)), "tokens": policy, "batch_tokens": batch_tokens, "dtype": dtype}
            ways[f"{count} layers, {policy}"] = lambda o=options: profile_model(model, prompts, **o).close()
    if others:
        ways |= _others(model, batches)
    taken = in_turns(ways, repeats)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "device": str(model.device), "tokens": n_tokens, "padding": 1 - n_tokens / padded, "repeats": repeats,
        "plain": n_tokens / seconds["plain"],
        "ratio": {name: seconds["plain"] / s for name, s in seconds.items() if name != "plain"},
        "spread": {name: spread(values) for name, values in ratios(taken, "plain").items() if name != "plain"},
        "longest": longest, "shortest": shortest,
    }  # fmt: skip


def _others(model: Model, batches: list[dict[str, torch.Tensor]]) -> dict[str, Callable[[], Any]]:
    import copy

    from nnsight import TransformersModel
    from transformer_lens import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:  # it takes nothing but a folder, and changes the module that it reads
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        lens = TransformerBridge.boot_transformers(folder, device=str(model.device), dtype=model.dtype)
    traced = TransformersModel(copy.deepcopy(model.module), tokenizer=model.tokenizer)
    blocks = traced.transformer.h

    def hidden_states() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.module(**batch, output_hidden_states=True)

    def transformer_lens() -> None:
        with torch.inference_mode():
            for batch in batches:
                lens.run_with_cache(batch["input_ids"], attention_mask=batch["attention_mask"],
                                    names_filter=lambda name: name.endswith("hook_resid_post"))  # fmt: skip

    def nnsight() -> None:
        with torch.inference_mode():
            for batch in batches:
                with traced.trace(batch["input_ids"], attention_mask=batch["attention_mask"]) as tracer:
                    kept = tracer.cache(modules=list(blocks)).save()
                assert kept[blocks[0].path].output.shape[0] == len(batch["input_ids"])

    return {"output_hidden_states": hidden_states, "run_with_cache": transformer_lens, "nnsight trace": nnsight}


def memory(n_rows: int, *, row_length: int = 100) -> dict[str, Any]:
    """Peak memory (MiB) of a child process that profiles `n_rows` tokens of a tiny model, and before it began."""
    code = f"import json; from tests.benchmarks import profile_bench as b; json.dump(b._measure({n_rows}, {row_length}), out)"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0"}
    line = [sys.executable, "-c", f"import sys; out = sys.stdout; {code}"]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(n_rows: int, row_length: int) -> dict[str, Any]:
    import resource

    from tests.conftest import make_model

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    folder = Path(tempfile.mkdtemp())
    model = make_model("llama")
    few = random_prompts(64, row_length, row_length)
    with profile_model(model, few, tokens="all"):
        pass
    prompts = random_prompts(n_rows // row_length, row_length, row_length)
    before, start = peak(), time.perf_counter()
    try:
        with profile_model(model, prompts, folder / "store", tokens="all") as store:
            return {"rows": store.n_rows, "before": before, "peak": peak(), "grown": peak() - before,
                    "bytes": store.n_bytes, "seconds": time.perf_counter() - start}  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def padding_mask(model: Model | None = None, *, batch_tokens: int = 2048, repeats: int = 5) -> dict[str, float]:
    """Seconds of the decoder with the padding's mask and without: right-padded and causal, rows do not need it."""
    model = model or gpt2_small()
    batches = batches_of(model, random_prompts(48, 32, 256), batch_tokens)

    def run(masked: bool) -> None:
        with torch.inference_mode():
            for batch in batches:
                model.decoder(input_ids=batch["input_ids"], use_cache=False,
                              attention_mask=batch["attention_mask"] if masked else None)  # fmt: skip

    return interleaved({"with": lambda: run(True), "without": lambda: run(False)}, repeats)
