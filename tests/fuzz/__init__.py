"""Every parser of outside files against inputs that nobody would write: `python -m tests.fuzz`, see docs/trust.md."""
