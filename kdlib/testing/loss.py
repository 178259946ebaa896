"""Contract checks of a loss."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from kdlib._checks import check_callable, check_floating, check_number, check_same_batch
from kdlib.testing._loss_case import LossCase, pack
from kdlib.testing._run import clone, run
from kdlib.types import WeightedLoss

__all__ = ["LOSS_CHECKS", "check_loss"]

LOSS_CHECKS = (
    "deepcopy", "scalar", "student_gradient", "teacher_gradient", "reduction_none", "mean_of_none", "weighted_mean",
    "weight_ones", "weight_scale", "weight_zero_masks", "weight_all_zero", "float16", "bfloat16", "float64", "autocast",
    "zero_rows", "equal_rows", "batch_of_one", "empty_batch", "large_float16", "large_float32", "batch_mismatch",
    "deterministic", "inputs_unchanged", "on_meta", "pickle", "state_dict", "repr", "gradcheck",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""

_PER_SAMPLE = ("mean_of_none", "weighted_mean")
_MODULE = ("state_dict", "repr")


def check_loss(
    loss: Callable[..., Tensor],
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    target: Tensor | None = None,
    per_sample: bool | None = None,
    exclude: Collection[str] = (),
) -> tuple[str, ...]:
    """Check a loss against the contract of this library.

    - `scalar`, `student_gradient`, `teacher_gradient`: one finite floating-point value; a finite nonzero gradient for
      the student and none for the teacher.
    - `reduction_none`: `(b,)` values, or a `ValueError` where the loss has no per-sample form; `mean_of_none`: their
      mean equals the value.
    - `weighted_mean`: `sum(w * l) / sum(w)`, and `w * l` for `"none"`; `weight_ones`: the same as without weights;
      `weight_scale`: a common factor has no effect; `weight_zero_masks`: the same as without the sample, which gets no
      gradient; `weight_all_zero`: 0 with a graph.
    - `float16`, `bfloat16`, `autocast`: the result is float32 and equals that of the same numbers in float32;
      `float64`: the result is float64.
    - `zero_rows`, `equal_rows`, `batch_of_one`, `empty_batch`, `large_float16` (values to 300), `large_float32` (to
      10,000): a finite value and finite gradients.
    - `batch_mismatch`: a `ValueError` or `TypeError`.
    - `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`, `state_dict`: the same value twice, and after a copy;
      `repr`: the call that rebuilds the object; `gradcheck`: the gradient against differences, in float64.
    - `on_meta`: value and gradient on the meta device, so nothing is read from the device or stays on the CPU.

    Every check works on a copy of the loss, so that a loss with a state (a queue, a running mean) starts anew each
    time; only `deepcopy` calls the loss itself.

    Args:
        loss: called as `loss(student, teacher)`, with `target=` if one is given, and with `reduction=` and `weight=`.
            Exclude the checks on these for a loss that does not accept them.
        student: `(b, ...)`, at least 4 samples, without special values, and small: about 8 values per sample. A list
            of tensors for a loss that compares several layers.
        teacher: `(b, ...)`, or a list.
        target: `(b, ...)`, for a loss that needs one.
        per_sample: whether `reduction="none"` must return `(b,)` or be an error; `None` for the value that a
            `WeightedLoss` declares, or for either with other losses.
        exclude: names of checks to skip.

    Returns:
        The names of the checks that ran. `mean_of_none` and `weighted_mean` run for losses with a per-sample form,
        `state_dict` and `repr` for Modules.

    Examples:
        >>> import torch
        >>> from kdlib import HintLoss
        >>> generator = torch.Generator().manual_seed(0)
        >>> student, teacher = torch.randn(2, 4, 6, generator=generator)
        >>> set(check_loss(HintLoss(), student, teacher)) == set(LOSS_CHECKS)
        True
        >>> some = {"scalar", "teacher_gradient", "batch_of_one"}
        >>> check_loss(lambda s, t: (s - t).mean(), student, teacher, exclude={*LOSS_CHECKS} - some)
        Traceback (most recent call last):
        AssertionError: check_loss(<lambda>): teacher_gradient: no gradient may reach the teacher; detach it
    """
    check_callable("check_loss", "loss", loss)
    for side, given in (("student", student), ("teacher", teacher)):
        for layer in [given] if isinstance(given, Tensor) else given:
            check_floating("check_loss", **{side: layer})
    (s, s_layers), (t, t_layers) = pack(student), pack(teacher)
    check_same_batch("check_loss", "student", s, "teacher", t)
    check_number("check_loss", "the batch size", s.shape[0], min=4, integer=True)
    if target is not None:
        check_same_batch("check_loss", "student", s, "target", target)
    if per_sample is None and isinstance(loss, WeightedLoss):
        per_sample = loss.per_sample
    tensors = clone(s).float(), clone(t).float(), None if target is None else clone(target)
    case = LossCase(
        loss, *tensors, per_sample, "deepcopy" not in exclude, "weight_ones" not in exclude, (s_layers, t_layers)
    )
    if case.per_sample is None:
        case.per_sample = case.accepts_none()
    left_out = {*(() if case.per_sample else _PER_SAMPLE), *(() if isinstance(loss, nn.Module) else _MODULE)}
    return run("check_loss", case, LOSS_CHECKS, exclude, left_out)
