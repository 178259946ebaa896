"""Evaluation of models by protocols: images to embeddings to results."""
