"""Faults injected at every step of every verb that writes: `python -m tests.faults`, or `make faults`."""
