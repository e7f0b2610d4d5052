"""Questions asked of stored activations and fitted maps; results that `workbench.plots` can draw."""
