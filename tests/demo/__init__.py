"""``make demo``: the tour of the README, run for real on structures made here. ``python -m tests.demo``."""
