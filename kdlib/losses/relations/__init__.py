"""Losses that compare the relations between the samples of a batch."""
