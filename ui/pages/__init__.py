"""The pages of the explorer: widgets and calls; figures come from `workbench.plots`, numbers from `workbench` and `probes`."""
