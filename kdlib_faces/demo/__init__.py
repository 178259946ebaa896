"""The demo: train the recipe, evaluate all models, write the report."""
