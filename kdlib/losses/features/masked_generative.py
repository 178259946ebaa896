"""Masked generative distillation: generate the teacher's features from randomly masked features of the student."""

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_floating, check_number, check_same_batch, check_shape, check_weight
from kdlib._maths import FAR, Reduction, full_precision, promote, reduce
from kdlib.losses._layers import convolve, kept, limit, mean_square_error, pool_to_smaller
from kdlib.losses._module import LossModule

__all__ = ["MaskedGenerativeLoss"]

WORD = 2**32
LOW_BITS = WORD - 1


class MaskedGenerativeLoss(LossModule):
    r"""Mean squared error between the teacher's features and those generated from masked features of the student.

    .. math:: \frac{1}{n} \lVert G(M \odot A(s)) - t \rVert^2

    for a sample with n values, where s and t are the feature maps of the student and of the teacher. A is a 1x1
    convolution to the teacher's channels, or the identity if both have the same number of channels. M is a random mask
    of zeros and ones, the same for all channels (`mask="spatial"`) or for all positions (`mask="channel"`). The
    generation block G is a 3x3 convolution, ReLU and a 3x3 convolution, with as many channels as the teacher. If the
    grids differ, the larger feature is average-pooled to the smaller height and the smaller width. Computations use
    float32 even if the parameters have half precision.

    The masks are a function of `seed`, of the number of calls in training mode, which is part of the state dict, and of
    the position in the batch. The global random state is neither read nor changed, and a resumed run uses the same
    masks as an uninterrupted one. In eval mode the masks do not change from call to call. In a distributed run, give
    each process its own seed for different masks.

    A and G have parameters, which the optimizer must receive; they are not part of the deployed student.

    Args:
        student_channels: c of the student's features `(b, c, h, w)`.
        teacher_channels: the same of the teacher.
        mask_ratio: probability that a position or a channel is masked, from 0 to below 1.
        mask: `"spatial"` or `"channel"`.
        seed: seed of the masks, at least 0.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Examples:
        >>> import torch
        >>> loss = MaskedGenerativeLoss(8, 16, mask_ratio=0.5)
        >>> loss
        MaskedGenerativeLoss(8, 16, mask_ratio=0.5, mask='spatial', seed=0, reduction='mean')
        >>> loss(torch.rand(2, 8, 14, 14), torch.rand(2, 16, 7, 7)).shape
        torch.Size([])
        >>> loss.kept_positions(2, (1, 4)).shape
        torch.Size([2, 1, 1, 4])

    References:
        Yang, Li, Shao, Shi, Yuan, Yuan, *Masked Generative Distillation*, arXiv 2205.01529. The paper uses the sum of
        the squares, ours is their mean over the values of a sample, as in modelopt: multiply the weight of the term by
        c h w of the teacher for the paper's. The authors' code masks positions with a ratio of 0.65 for detection and 0.75 for
        segmentation, and channels with a ratio of 0.15 for classification; it requires equal grids.
    """

    calls: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        mask_ratio: float = 0.65,
        mask: str = "spatial",
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "MaskedGenerativeLoss"
        check_number(owner, "student_channels", student_channels, min=1, integer=True)
        check_number(owner, "teacher_channels", teacher_channels, min=1, integer=True)
        check_number(owner, "mask_ratio", mask_ratio, min=0, below=1)
        check_choice(owner, "mask", mask, ("spatial", "channel"))
        check_number(owner, "seed", seed, min=0, integer=True)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.mask_ratio, self.mask, self.seed = mask_ratio, mask, seed
        same = student_channels == teacher_channels
        self.align = None if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.first = nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1)
        self.second = nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def kept_positions(self, batch: int, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Return the mask of the next call: `(b, 1, h, w)` or `(b, teacher_channels, 1, 1)`, False where masked.

        Samples outside of `keep` `(b,)` have no mask of their own, so that they do not change those of the others.
        """
        shape = (1, *grid) if self.mask == "spatial" else (self.teacher_channels, 1, 1)
        size = shape[0] * shape[1] * shape[2]
        device = self.calls.device
        rows = torch.arange(batch, device=device) if keep is None else (keep.cumsum(0) - 1).clamp(min=0)
        index = rows[:, None] * size + torch.arange(size, device=device)
        start = _mix(_mix(self.calls & LOW_BITS) + (self.seed & LOW_BITS))
        drawn = _mix(start ^ _mix(index & LOW_BITS))
        return (drawn >= int(self.mask_ratio * WORD)).reshape(batch, *shape)

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: Reduction | None = None
    ) -> Tensor:
        """Compare `student` `(b, c, h, w)` with `teacher` `(b, c, h, w)`; `reduction=None` uses the constructor's."""
        owner = "MaskedGenerativeLoss"
        check_floating(owner, student=student, teacher=teacher)
        check_shape(owner, "student", student, "b c h w", c=self.student_channels)
        check_shape(owner, "teacher", teacher, "b c h w", c=self.teacher_channels)
        check_same_batch(owner, "student", student, "teacher", teacher)
        check_weight(owner, weight, student.shape[0])
        origin = student.dtype
        with full_precision(student):
            student, teacher = promote(student, teacher)
            if student.shape[2:] != teacher.shape[2:]:
                student, teacher = pool_to_smaller(student.clamp(-FAR, FAR), teacher.clamp(-FAR, FAR))
            grid = (student.shape[2], student.shape[3])
            mask = self.kept_positions(student.shape[0], grid, kept(weight)).to(student.dtype)
            if self.align is None:
                x = limit(student * mask, origin, fresh=True)
            else:
                x = convolve(self.align, limit(student, origin)) * mask
            x = convolve(self.second, convolve(self.first, x).relu_())
            if self.training:
                self.calls.add_(1)
            return reduce(owner, mean_square_error(x, teacher), reduction or self.reduction, weight)


def _mix(x: Tensor) -> Tensor:
    """Hash numbers below 2^32; all products stay below 2^63, so that every device returns the same."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & LOW_BITS
    return x ^ (x >> 16)
