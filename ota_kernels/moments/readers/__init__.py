"""Readers of training checkpoints: what an optimizer saved --> a Source of second moments by name.

A format is a row of `formats.py`: what recognises a checkpoint, what reads it. `matching.py`, `order.py` and
`decay.py` find the names of parameters where an optimizer numbers them.
"""
