"""What a paste costs: folding through the Gram against dense pseudo-inverses, generating with it, and its size on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.adapters.adapter import Adapter, LowRank
from workbench.maps.linear_map import LinearMap
from workbench.maps.solver import Solver
from workbench.paste import fold_gram, fold_part
from workbench.sites import Site

from .timing import spread

PROMPTS, WIDTHS, RANK, LAYERS = 1030, (4096, 3072), 8, 14


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def both(run: Callable[[], Any]) -> Tensor:
    """Seconds on the wall, and of all threads of this process: the second does not grow with what else the machine does."""
    start = time.process_time()
    wall = seconds(run)
    return torch.tensor([wall, time.process_time() - start])


def _rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def _part(width: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(width, RANK, generator=g) / width**0.5, torch.randn(RANK, generator=g),
                   torch.randn(RANK, width, generator=g))  # fmt: skip


def folding(folder: Path, n: int = PROMPTS, widths: tuple[int, int] = WIDTHS, layers: int = LAYERS) -> dict[str, Any]:
    """One layer both ways, all layers through the Gram (each with profiles of its own), and the paste on disk."""
    recipient, donor = widths
    x, y, part = _rows(n, recipient, 0), _rows(n, donor, 1), _part(donor, 2)
    grams = torch.stack([both(lambda: fold_gram(part, x, y)) for _ in range(3)])
    gram = grams.median(0).values
    made: list[LowRank] = []

    def dense() -> None:
        there, back = torch.linalg.pinv(x) @ y, torch.linalg.pinv(y) @ x
        zero = torch.zeros(1)
        made.append(fold_part(part, LinearMap(there, zero.expand(donor)), LinearMap(back, zero.expand(recipient))))

    full, ours = both(dense), fold_gram(part, x, y)
    difference = max(float((a - b).norm() / b.norm()) for a, b in ((ours.V, made[0].V), (ours.U, made[0].U)))
    parts: dict[Site, LowRank] = {}
    every, ridges = torch.zeros(2), torch.zeros(2)
    for layer in range(layers):
        x, y, part = _rows(n, recipient, 10 + layer), _rows(n, donor, 50 + layer), _part(donor, layer)

        def one(layer: int = layer, x: Tensor = x, y: Tensor = y, part: LowRank = part) -> None:
            parts[Site(layer)] = fold_gram(part, x, y)

        every += both(one)

        def ridge(x: Tensor = x, y: Tensor = y, part: LowRank = part) -> None:
            Solver.factor(x).coefficients(y @ part.V, 0.1)
            Solver.factor(y).project(part.U, x, 0.1)

        ridges += both(ridge)
    adapter = Adapter(parts)
    adapter.save(folder / "paste")
    adapter.to(torch.bfloat16).save(folder / "half")
    adapter.save(folder / "small", storage="int8")
    names = ("paste", "half", "small")
    size, half, small = (sum(f.stat().st_size for f in (folder / name).iterdir()) for name in names)
    timed = {"gram_s": gram, "dense_s": full, "ratio": full / gram, "all_s": every, "ridge_all_s": ridges}
    return {"n": n, "widths": list(widths), "layers": layers, **{name: pair.tolist() for name, pair in timed.items()},
            "gram_spread": spread(grams[:, 0].tolist()),
            "difference": difference, "bytes": size, "bytes_bf16": half, "bytes_int8": small,
            "threads": torch.get_num_threads()}  # fmt: skip


def _model(width: int, layers: int, heads: int) -> Any:
    import transformers as tf
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    from workbench.models import load

    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50257, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=1, eos_token_id=2,
                           pad_token_id=0)  # fmt: skip
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(50253))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                           unk_token="<unk>")  # fmt: skip
    return load(tf.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)


def generation(
    width: int = 768, layers: int = 12, heads: int = 12, tokens: int = 48, batch: int = 4, repeats: int = 5
) -> dict[str, Any]:
    """Seconds of generating with the paste and with the reference's way, over those of the plain model, in turns.

    The reference keeps dense converters, and takes h F, delta of the donor's adapter and its way back in a hook of every
    edited layer, at each forward pass; only the last prompt position of a prefill is edited there, and here.
    """
    model = _model(width, layers, heads)
    sites, donor = [Site(l) for l in range(0, layers, 2)], width + width // 3
    g = torch.Generator().manual_seed(1)
    there = {s: torch.randn(width, donor, generator=g) / width**0.5 for s in sites}
    back = {s: torch.randn(donor, width, generator=g) / donor**0.5 for s in sites}
    parts = {s: _part(donor, s.layer) for s in sites}
    zeros = torch.zeros(donor), torch.zeros(width)
    paste = (
        Adapter({s: fold_part(parts[s], LinearMap(there[s], zeros[0]), LinearMap(back[s], zeros[1])) for s in sites})
        * 1e-3
    )
    ids = torch.randint(4, 50257, (batch, 32), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    @contextmanager
    def each_step() -> Any:
        def edit(site: Site) -> Any:
            def fn(h: Tensor, where: Any) -> Tensor:
                moved = parts[site].delta(h @ there[site]) @ back[site] * 1e-3  # of every token, then one is kept
                return h + moved * where.mask("last")[..., None]

            return fn

        with model.edit({s: edit(s) for s in sites}):
            yield

    ways: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "paste": lambda: paste.on(model),
        "each_step": each_step,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            with torch.inference_mode(), way():
                took = seconds(lambda: model.module.generate(ids, attention_mask=torch.ones_like(ids), **options))
            if turn:  # the first turn warms up
                times[name].append(took)
    # of each turn by itself: what else the machine does then meets all three
    each = {name: [a / b for a, b in zip(t, times["plain"], strict=True)] for name, t in times.items()}
    ratios = {name: statistics.median(values) for name, values in each.items()}
    return {"layers": len(sites), "tokens": tokens, "batch": batch, "repeats": repeats, "paste": ratios["paste"],
            "each_step": ratios["each_step"], "plain_s": statistics.median(times["plain"]),
            "spread": {name: spread(values) for name, values in each.items()}, "prompt": ids.shape[1]}  # fmt: skip


def run(folder: Path) -> dict[str, Any]:
    """Everything, as the tables tell it."""
    return {"fold": folding(folder), "generation": generation()}
