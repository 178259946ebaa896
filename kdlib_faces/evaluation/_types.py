"""Array types of the evaluation."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

ArrayLike: TypeAlias = npt.ArrayLike
"""An array, a tensor or a nested sequence."""
Embeddings: TypeAlias = npt.ArrayLike | Iterable[npt.NDArray[Any]]
"""One (n, d) array, or shards of it: a sequence or an iterator of (m, d) arrays."""
AnyArray: TypeAlias = npt.NDArray[Any]
LabelArray: TypeAlias = npt.NDArray[Any]
"""Whole numbers or strings."""
FloatArray: TypeAlias = npt.NDArray[np.float64]
SingleArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Label: TypeAlias = Callable[[int], str]
"""Row number to the name of the image."""
JsonDict: TypeAlias = dict[str, Any]
"""Plain values for JSON."""
