"""The page of converters: its frame, and the panels of one pair of layers."""
