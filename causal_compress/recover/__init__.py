"""Recovery: the student learns from the teacher; see distill.py."""
