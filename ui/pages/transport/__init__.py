"""The page of transport runs: its frame, and the parts that a run may lack."""
