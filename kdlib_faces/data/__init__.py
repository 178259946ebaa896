"""Data room: images, ages and identities, from folders, lists and the drawn set."""

from kdlib_faces.data.bin import BinSet, load_bin, save_bin
from kdlib_faces.data.synthetic import SyntheticFace, SyntheticFaces

__all__ = ["BinSet", "SyntheticFace", "SyntheticFaces", "load_bin", "save_bin"]
