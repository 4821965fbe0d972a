"""The demo: small experts on handwritten digits, trained, merged by the engine, and measured.

Only `ota-merge demo` imports this package: it needs torch and, for the digits, scikit-learn.
"""

from .table import Row, run

__all__ = ["Row", "run"]
