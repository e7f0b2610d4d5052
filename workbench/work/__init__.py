"""Counted work: FLOPs and bytes of what a model and its maps are asked for, from a configuration alone.

Of a model's passes here, of moments, fits and folds in `maps.counts`; `rates` makes time of them.
"""

from .lengths import Lengths
from .passes import cache_bytes, forward, generation, store_bytes, training
from .shape import BlockShape, ModelShape, open_shape
from .work import Work

__all__ = [
    "BlockShape", "Lengths", "ModelShape", "Work", "cache_bytes", "forward", "generation", "open_shape", "store_bytes",
    "training",
]  # fmt: skip
