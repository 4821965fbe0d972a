"""Second moments: get them out of checkpoints, shrink them, look at them, or estimate them.

extract(checkpoint, out, model)  a training checkpoint's second moments, as a file that a merge reads
show(file)                       what such a file holds
"""

from .extraction import Summary, extract
from .overview import Overview, show

__all__ = ["Overview", "Summary", "extract", "show"]
