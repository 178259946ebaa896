"""Data room: images, ages and identities, from folders, lists and the drawn set."""

from kdlib_faces.data.synthetic import SyntheticFace, SyntheticFaces

__all__ = ["SyntheticFace", "SyntheticFaces"]
