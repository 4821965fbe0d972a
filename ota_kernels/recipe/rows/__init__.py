"""The rows of the table of methods, by family. Importing this room fills the table."""

from . import elementwise, grafts, gram, linear, ota, spectral, task_vectors

__all__ = ["elementwise", "grafts", "gram", "linear", "ota", "spectral", "task_vectors"]
