"""The linear part of feed-forward networks, folded away: which channels are idle, what stands for them, the model rewritten.

`ffn` finds the networks, `calibration` sums up what their channels do, `plan` chooses idle channels and the map that takes
their place, `architecture` makes the folded model one that transformers saves, loads and runs. `batch_norm` is the exact
form of RePaViT, for networks that were trained with idle channels.
"""
