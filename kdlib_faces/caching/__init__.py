"""Caches of teacher outputs for face lists."""
