"""Smaller: what every change would cost is measured, one plan is chosen, and the surgery is carried out and repaired."""
