"""The page of lenses."""
