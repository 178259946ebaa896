"""Encoded images by row: files, records of a RecordIO file, members of tar shards, and several of them joined."""
