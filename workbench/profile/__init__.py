"""Model x prompts -> store or moments: planned, run, streamed and resumable."""

from .profile import profile_model
from .run import run_blocks

__all__ = ["profile_model", "run_blocks"]
