"""The pages of the explorer, a package each: `page.py` is what the address shows, the modules beside it are its parts.

They hold widgets and calls; figures come from `workbench.plots`, numbers from `workbench` and `probes`.
"""
