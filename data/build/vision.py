"""Trains a small vision transformer with BatchNorm networks and its channel-idle twin, and folds the twin.

`python -m data.build.vision` prints what came of it. No weights are kept: a run takes about a minute on two cores.
Source of the form: RePaViT (arXiv:2505.21847), whose claim at ImageNet's size is that a model trained with three quarters of
its channels idle is folded without any change of its outputs, is faster, and is nearly as good as its dense twin.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

from workbench.evaluate.statistics import rate
from workbench.folding.vision import ChannelIdleViTConfig, ChannelIdleViTForImageClassification, fold_vit

from .images import CLASSES, SIZE, images

CONFIG = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=6,
              num_labels=CLASSES, initializer_range=0.08)  # fmt: skip
SEEDS = {"train": 0, "test": 1}


def train(theta: float, *, steps: int = 400, batch: int = 64, n: int = 6000, seed: int = 0, lr: float = 1.5e-3) -> Any:
    """A model trained on seeded images from a seeded start; theta 0 is the dense twin."""
    torch.manual_seed(seed)
    model = ChannelIdleViTForImageClassification(ChannelIdleViTConfig(**CONFIG, theta=theta)).train()
    pixels, labels = images(n, SEEDS["train"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, n, (batch,), generator=draw)
        model(pixel_values=pixels[index], labels=labels[index]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def predicted(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits [n, classes]."""
    with torch.inference_mode():
        return torch.cat([model(pixel_values=part).logits for part in pixels.split(250)])


def images_per_second(models: dict[str, Any], pixels: torch.Tensor, repeats: int = 7) -> dict[str, float]:
    """Medians over forward passes of the same batch, in turns, after one of each."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(pixel_values=pixels)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    return {name: len(pixels) / statistics.median(taken) for name, taken in seconds.items()}


def networks(model: Any) -> int:
    """Parameters of its feed-forward networks."""
    return sum(p.numel() for layer in model.vit.layers for p in layer.mlp.parameters())


def compare(
    thetas: tuple[float, ...] = (0.5, 0.75), *, steps: int = 400, n_test: int = 2000, **options: Any
) -> dict[str, Any]:
    """Accuracy, speed and size of the dense model, of each twin, and of each twin folded; and how far folding moves logits.

    options: of `train`.
    """
    pixels, labels = images(n_test, SEEDS["test"])
    dense = train(0.0, steps=steps, **options)
    models = {"dense": dense}
    moved: dict[str, float] = {}
    for theta in thetas:
        twin = train(theta, steps=steps, **options)
        models[f"idle {theta:g}"], models[f"folded {theta:g}"] = twin, fold_vit(twin)
        apart = predicted(models[f"folded {theta:g}"], pixels) - predicted(twin, pixels)
        moved[f"folded {theta:g}"] = float(apart.abs().max())
    speed = images_per_second(models, pixels[:64])
    lines = []
    for name, model in models.items():
        right = rate((predicted(model, pixels).argmax(1) == labels).tolist())
        lines.append({"model": name, "accuracy": right.value, "accuracy_low": right.low, "accuracy_high": right.high,
                      "images_per_s": speed[name], "speedup": speed[name] / speed["dense"], "ffn": networks(model),
                      "ffn_share": networks(model) / networks(dense), "moved": moved.get(name)})  # fmt: skip
    return {"steps": steps, "n_test": n_test, "lines": lines}


if __name__ == "__main__":
    print(json.dumps(compare(), indent=1))
