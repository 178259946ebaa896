"""Intervals, resampling and paired tests."""
