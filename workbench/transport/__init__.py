"""Transport operators: all pairs of layers of a model from moments, held out, beside their baselines and a control."""

from .grid import TransportGrid, transport_grid

__all__ = ["TransportGrid", "transport_grid"]
