"""The page of probes: its frame, and what is done with a probe that was trained."""
