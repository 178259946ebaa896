"""Losses of logits `(b, c)`."""
