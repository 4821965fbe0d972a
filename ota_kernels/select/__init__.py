"""Which elements: exact thresholds in one pass."""
