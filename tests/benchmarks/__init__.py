"""Every claim of speed and memory, measured; `make bench` runs what is here."""
