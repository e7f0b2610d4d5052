"""The explorer: pages that open a folder of runs and stores."""
