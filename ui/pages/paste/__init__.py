"""The page of pastes: its frame, the answers, the figures, and an adapter tried by itself."""
