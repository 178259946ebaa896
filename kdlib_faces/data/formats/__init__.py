"""Parsers of untrusted files: RecordIO, pickled sets, MATLAB, tables and text."""
