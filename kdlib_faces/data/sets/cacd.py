"""The pairs of CACD-VS, which the names of its images define."""

import numpy as np

from kdlib_faces.data.image_pairs import ImagePairs, gather_pairs

__all__ = ["cacd_vs_pairs"]

PAIRS, FOLD = 4000, 400


def cacd_vs_pairs() -> ImagePairs:
    """Return the 4,000 pairs of CACD-VS, the verification subset of CACD: 2,000 genuine, 2,000 impostor, in ten folds.

    Pair k is `kkkk_0.jpg` and `kkkk_1.jpg`. Fold f is pairs 400 f to 400 f + 399, of which the first 200 are genuine. The
    names are anonymous, and ages are not given. `ImagePairs.locate` counts pairs whose images are missing.

    Returns:
        ImagePairs named `CACD-VS`.

    Examples:
        >>> pairs = cacd_vs_pairs()
        >>> pairs
        <ImagePairs: CACD-VS, 4000 pairs of 8000 images, 2000 genuine, 10 folds>
        >>> pairs.images[pairs.left[600]], bool(pairs.same[600]), int(pairs.fold_ids[600])
        ('0600_0.jpg', False, 1)
    """
    pairs = [(f"{pair:04d}_0.jpg", f"{pair:04d}_1.jpg", pair % FOLD < FOLD // 2) for pair in range(PAIRS)]
    return gather_pairs("CACD-VS", pairs, folds=np.arange(PAIRS) // FOLD, source="CACD-VS")
