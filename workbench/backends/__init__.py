"""Reading and editing activations: one contract, `read(model, sites)` and `edit(model, edits)`."""
