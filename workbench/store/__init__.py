"""Activations on disk: the folder, how it is read, written, checked, mended, merged, exported and imported."""

from .store import Rows, Store, check_pair

__all__ = ["Rows", "Store", "check_pair"]
