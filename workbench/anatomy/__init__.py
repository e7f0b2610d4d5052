"""Which parts of a model's blocks write to the residual stream, found and proved by what adds up."""

from .anatomy import ALWAYS, INNER, Anatomy, check, resolve

__all__ = ["ALWAYS", "INNER", "Anatomy", "check", "resolve"]
