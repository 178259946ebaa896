"""Readers of published face sets, one file per set."""
