"""Smaller: what every change would cost is measured, one plan is chosen, and surgery carries it out with repairs."""
