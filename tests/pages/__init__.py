"""The pages of docs/ whose numbers come from a run, and how they are written again."""
