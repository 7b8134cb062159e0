"""Training: the loop, what it optimises with, what it writes, and how processes work together."""
