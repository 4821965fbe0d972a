"""Merge fine-tuned models at memory speed: OTA merging with Fast Fisher Grafting (arXiv 2509.11167)."""
