"""Losses that compare the features of one sample: maps, tokens and embeddings."""
