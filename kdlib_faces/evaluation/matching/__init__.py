"""Search and scores: pairs of images, galleries, templates and distractors."""
