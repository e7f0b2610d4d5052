"""The page of cached activations: its frame, and a module for each view of a store."""
