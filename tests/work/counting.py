"""Counting what runs: FLOPs of matrix products, those of attention's fused kernels on the CPU among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_options: Any) -> int:
    """As torch counts the kernels of a GPU; it has no entry for that of the CPU."""
    return int(sdpa_flop_count(query, key, value))


KERNELS: dict[Any, Callable[..., int]] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def counted(run: Callable[[], Any]) -> float:
    """FLOPs of a call, two a multiply-add; attention as the whole square."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run()
    return float(counter.get_total_flops())
