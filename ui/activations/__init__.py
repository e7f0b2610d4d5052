"""The views of the page of activations."""
