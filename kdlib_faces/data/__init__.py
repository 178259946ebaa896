"""Data room: images, ages and identities, from folders, lists and the drawn set."""

from kdlib_faces.data.bin import BinSet, load_bin, save_bin
from kdlib_faces.data.record import RecordReader
from kdlib_faces.data.record_parts import IdentityRanges, Record, RecordProperties, read_property
from kdlib_faces.data.record_writer import save_records
from kdlib_faces.data.synthetic import SyntheticFace, SyntheticFaces

__all__ = [
    "BinSet",
    "IdentityRanges",
    "Record",
    "RecordProperties",
    "RecordReader",
    "SyntheticFace",
    "SyntheticFaces",
    "load_bin",
    "read_property",
    "save_bin",
    "save_records",
]
