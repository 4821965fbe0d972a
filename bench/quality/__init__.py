"""Merges of fine-tuned copies of a real pretrained encoder, on real texts: `python -m bench.quality`."""
