"""Makes the bundled models, tokenizers and prompts again from a seed: `python -m data.build`."""
