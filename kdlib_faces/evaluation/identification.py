"""Identification among distractors as a function of arrays."""

from collections.abc import Sequence
from typing import Literal

from kdlib_faces.evaluation._types import ArrayLike, Embeddings
from kdlib_faces.evaluation.matching.distractors import Cleaning
from kdlib_faces.evaluation.protocols.distractors import DistractorProtocol, DistractorResult
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS


def identify_with_distractors(
    probes: Embeddings,
    identities: ArrayLike,
    distractors: Embeddings,
    *,
    fars: Sequence[float] = (1e-6,),
    ranks: Sequence[int] = (1,),
    ties: Literal["correct", "wrong"] = "correct",
    cleaning: Cleaning = "none",
    sizes: Sequence[int] = (),
    ages: ArrayLike | None = None,
    gap_bins: Sequence[float] = GAP_STARTS,
    max_distractors: int | None = None,
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
    progress: bool = False,
) -> DistractorResult:
    """Identification and verification among distractors: MegaFace's challenge 1.

    For every ordered pair (mate g, probe p) of one identity the gallery is g and all distractors; the other mates are
    not in it. The trial is correct at rank k if cos(p, g) is at least p's k-th largest distractor cosine. The rate is
    over all Σ M(M-1) trials. Verification takes the pairs of one identity as genuine and all probes x distractors as
    impostors, with the exact rule of `tar_at_far`; its threshold comes from the largest scores kept during the search.

    Distractors are read once, in blocks; memory does not grow with their number. Products are float32, and every score
    that can decide something is computed again in float64, so neither blocks nor shards change a result.

    Args:
        probes: (n, d) embeddings, normalized or not, several of each identity.
        identities: (n,) whole numbers or strings.
        distractors: (m, d) array, memory map or tensor, or shards of it: a sequence or an iterator of arrays.
        fars: Target false accept rates, each allowing at most 20 million false accepts.
        ranks: Ranks.
        ties: Whether a mate as similar as the k-th distractor is `"correct"`, as published, or `"wrong"`.
        cleaning: How noisy distractors are marked in the set. `"none"`: there are none, a zero row is an error.
            `"extra_dimension"`: as insightface writes them, (m, d + 1) with a last column that is not 0; they match
            no probe. `"exclude_zeros"`: a zero row matches no probe. `"zeros_score_0"`: a zero row scores 0 against every
            probe, as in FaceX-Zoo, and so beats a mate of negative cosine.
        sizes: Numbers of distractors, rising, at which rank 1 is also reported: the first 10, 100, ... of them.
        ages: (n,) years; adds the rates by age gap between probe and mate.
        gap_bins: Rising lower ends of the gap bins, years.
        max_distractors: Upper bound on their number, required for an iterator of more than a million.
        replicates: Bootstrap resamples over identities; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals.
        progress: Show progress.

    Returns:
        The rates, and the number of distractors used.

    Raises:
        ValueError: A probe or distractor is not finite or zero (the message gives its row), there is no distractor, no
            identity has two images, or there are more distractors than `max_distractors`.

    Examples:
        >>> probes = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.6, 1.0]]
        >>> result = identify_with_distractors(probes, [0, 0, 1, 1], [[-1.0, 0.0], [1.0, 1.0]], fars=(0.1,))
        >>> result.rank1, result.tar[0.1].tar, result.tar[0.1].resolvable, result.distractors
        (0.75, 0.5, False, 2)

    References:
        I. Kemelmacher-Shlizerman et al., "The MegaFace benchmark", CVPR 2016. MegaFace is withdrawn: use any set, and
        name it beside the figure.
    """
    protocol = DistractorProtocol(
        identities,
        distractors,
        fars=fars,
        ranks=ranks,
        ties=ties,
        cleaning=cleaning,
        sizes=sizes,
        ages=ages,
        gap_bins=gap_bins,
        max_distractors=max_distractors,
        replicates=replicates,
        seed=seed,
        level=level,
        progress=progress,
    )
    return protocol.evaluate(probes)
