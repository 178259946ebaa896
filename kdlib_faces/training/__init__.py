"""Training of the recipes on face lists."""
