"""Factor transfer: distance between the factors of the teacher's and of the student's feature maps."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_callable, check_floating, check_number, check_rank, check_same_batch, check_shape
from kdlib._maths import Reduction, full_precision, hold_short, promote, reduce, rescale, safe_divisor
from kdlib._repr import CallRepr
from kdlib.losses._checks import check_epoch, check_order, check_trained
from kdlib.losses._layers import convolve, limit, mean_square_error, pool_to_smaller
from kdlib.losses._module import LossModule

__all__ = ["FactorTransferLoss", "Paraphraser", "factor_transfer"]

T = TypeVar("T")
SLOPE = 0.1
"""Slope of the leaky ReLU below zero, as in the paper."""


def factor_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    p: int = 1,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the distance between the unit-norm factors of the student and of the teacher.

    .. math:: \left\lVert \frac{f_s}{\lVert f_s \rVert_2} - \frac{f_t}{\lVert f_t \rVert_2} \right\rVert_p

    for a sample, with f the flattened factors. The loss does not depend on the scale of either side. Zero factors stay
    zero and get no gradient. If the grids differ, the larger factors are average-pooled to the smaller height and the
    smaller width.

    Args:
        student: factors `(b, c, h, w)` of the student, usually the output of a translator.
        teacher: factors `(b, c, H, W)` of the teacher with the same number of channels, usually from a `Paraphraser`;
            never receives a gradient.
        p: order of the norm, 1 or 2.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input is not `(b, c, h, w)`, batch sizes or numbers of channels differ, `p` is neither 1 nor 2,
            or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1)
        >>> round(factor_transfer(student, teacher).item(), 4)  # |0.6 - 1| + |0.8 - 0|
        1.2
        >>> round(factor_transfer(student, teacher, p=2).item(), 4)
        0.8944

    References:
        Kim, Park, Kwak, *Paraphrasing Complex Network: Network Compression via Factor Transfer*, arXiv 1802.04977.
        The authors' code and torchdistill use the mean over the values of a sample for p = 1: multiply our value by
        1 / (c h w) for theirs. RepDistiller compares attention maps of the factors instead.
    """
    check_order("factor_transfer", p)
    check_floating("factor_transfer", student=student, teacher=teacher)
    check_rank("factor_transfer", "student", student, "b c h w")
    check_shape("factor_transfer", "teacher", teacher, "b c h w", c=student.shape[1])
    check_same_batch("factor_transfer", "student", student, "teacher", teacher)
    origin = student.dtype
    with full_precision(student):
        (student, size), (teacher, _) = (rescale(x) for x in promote(student, teacher))
        student, teacher = pool_to_smaller(student, teacher)
        (s, length), (t, _) = _unit(student), _unit(teacher)
        losses = hold_short(torch.linalg.vector_norm(s - t, ord=p, dim=1), size * length.detach(), origin)
        return reduce("factor_transfer", losses, reduction, weight)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit rows `(b, n)` of rescaled maps and their lengths `(b,)`."""
    rows = x.flatten(1)
    length = torch.linalg.vector_norm(rows, dim=1)
    return rows / safe_divisor(length)[:, None], length


class Paraphraser(CallRepr):
    r"""An autoencoder of a teacher's feature map, whose code are the factors of `FactorTransferLoss`.

    The encoder has three 3x3 convolutions: c to c, c to k and k to k channels, with :math:`k = \mathrm{round}(rate \,
    c)` and at least 1. The decoder has three in the reverse order. Each is followed by a leaky ReLU of slope 0.1. It is
    trained without labels to reconstruct the teacher's features and then frozen, by `fit` or by a loop of your own
    around `reconstruction_loss`, followed by `freeze`.

    Args:
        channels: c of the teacher's features `(b, c, h, w)`.
        rate: number of factor channels relative to c, above 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Examples:
        >>> import torch
        >>> paraphraser = Paraphraser(8, rate=0.5)
        >>> paraphraser.factors
        4
        >>> loader = [torch.rand(2, 3, 6, 6) for _ in range(4)]
        >>> teacher = torch.nn.Conv2d(3, 8, 3)
        >>> losses = paraphraser.fit(loader, lambda images: teacher(images), epochs=3)
        >>> len(losses), paraphraser.trained
        (3, True)
        >>> paraphraser(teacher(loader[0])).shape
        torch.Size([2, 4, 4, 4])

    References:
        See `factor_transfer`. The paper minimizes the squared error of the reconstruction, as we do; the authors' code
        minimizes the absolute error with SGD. `fit` uses Adam, which is our choice. torchdistill adds BatchNorm.
    """

    is_trained: Tensor

    def __init__(self, channels: int, *, rate: float = 0.5) -> None:
        super().__init__()
        check_number("Paraphraser", "channels", channels, min=1, integer=True)
        check_number("Paraphraser", "rate", rate, above=0)
        self.channels, self.rate = channels, rate
        self.factors = max(1, round(rate * channels))
        self.encoder = encoder(channels, self.factors)
        self.decoder = encoder(self.factors, channels)
        self.trained = False
        """Whether the training has ended."""
        self.register_buffer("is_trained", torch.zeros((), dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Return the factors of features: `(b, c, h, w)` to `(b, k, h, w)`, in float32 or float64."""
        check_floating("Paraphraser", features=features)
        check_shape("Paraphraser", "features", features, "b c h w", c=self.channels)
        with full_precision(features):
            return encode(self.encoder, features.to(torch.promote_types(features.dtype, torch.float32)), features.dtype)

    def reconstruction_loss(self, features: Tensor) -> Tensor:
        """Return the mean squared error of the reconstruction, a scalar; `features` `(b, c, h, w)` get no gradient."""
        factors = self(features.detach())
        with full_precision(features):
            target = limit(features.detach().to(factors.dtype), factors.dtype)
            errors = mean_square_error(encode(self.decoder, factors, factors.dtype), target)
            return reduce("Paraphraser", errors, "mean", None)

    def fit(
        self, loader: Iterable[T], features: Callable[[T], Tensor], *, epochs: int = 5, lr: float = 1e-3
    ) -> list[float]:
        """Train on the teacher's features with Adam, then freeze.

        In a distributed run, call it on every process; `DistributedDataParallel` later copies the weights of the first.

        Args:
            loader: yields batches of any kind, in each epoch.
            features: maps a batch to the teacher's features `(b, c, h, w)`, such as
                `lambda batch: teacher(batch[0])["map"]`; called without gradients.
            epochs: passes over the loader, at least 1.
            lr: learning rate, above 0.

        Returns:
            The mean reconstruction loss of each epoch.

        Raises:
            ValueError: an epoch without a batch.
        """
        check_callable("Paraphraser", "features", features)
        check_number("Paraphraser", "epochs", epochs, min=1, integer=True)
        check_number("Paraphraser", "lr", lr, above=0)
        self.requires_grad_(True)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        means = []
        for epoch in range(epochs):
            values = []
            for batch in loader:
                with torch.no_grad():
                    x = features(batch)
                with torch.enable_grad():
                    loss = self.reconstruction_loss(x)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                values.append(loss.detach())
            check_epoch("Paraphraser", epoch, len(values))
            means.append(float(torch.stack(values).mean()))
        self.freeze()
        return means

    def freeze(self) -> None:
        """End the training: the weights get no gradient from now on, and a `FactorTransferLoss` accepts them."""
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = None
        self.is_trained.fill_(True)
        self.trained = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}is_trained" in state_dict:
            self.trained = bool(state_dict[f"{prefix}is_trained"])


class FactorTransferLoss(LossModule):
    r"""`factor_transfer` between the translated features of the student and the paraphrased ones of the teacher.

    .. math:: \mathrm{factor\_transfer}(\mathrm{translator}(s), \mathrm{paraphraser}(t))

    The translator has the three convolutions of the paraphraser's encoder, from the student's channels to the factors.
    Its parameters must be passed to the optimizer; they are not part of the deployed student. The `Paraphraser` belongs
    to the teacher: it must be trained before the first call, and it is frozen. It is part of the state dict, so that a
    resumed run does not train it again. Computations use float32 even if the parameters have half precision.

    Args:
        student_channels: c of the student's features `(b, c, h, w)`.
        teacher_channels: the same of the teacher.
        rate: number of factor channels relative to `teacher_channels`, above 0.
        p: order of the norm, 1 or 2.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
        RuntimeError: a call before the paraphraser is trained.

    Examples:
        >>> import torch
        >>> loss = FactorTransferLoss(4, 8)
        >>> loss
        FactorTransferLoss(4, 8, rate=0.5, p=1, reduction='mean')
        >>> loss.paraphraser
        Paraphraser(8, rate=0.5)
        >>> teacher, loader = torch.nn.Conv2d(3, 8, 3), [torch.rand(2, 3, 6, 6) for _ in range(4)]
        >>> losses = loss.paraphraser.fit(loader, lambda images: teacher(images), epochs=2)
        >>> loss(torch.rand(2, 4, 8, 8), teacher(loader[0])).shape
        torch.Size([])

    References:
        See `factor_transfer` and `Paraphraser`. The authors' code multiplies the mean over the values by 500.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        rate: float = 0.5,
        p: int = 1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "FactorTransferLoss"
        check_number(owner, "student_channels", student_channels, min=1, integer=True)
        check_number(owner, "teacher_channels", teacher_channels, min=1, integer=True)
        check_number(owner, "rate", rate, above=0)
        check_order(owner, p)
        self.student_channels, self.teacher_channels, self.rate, self.p = student_channels, teacher_channels, rate, p
        self.paraphraser = Paraphraser(teacher_channels, rate=rate).requires_grad_(False)
        self.translator = encoder(student_channels, self.paraphraser.factors)

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: Reduction | None = None
    ) -> Tensor:
        """Compare `student` `(b, c, h, w)` with `teacher` `(b, c, h, w)`; `reduction=None` uses the constructor's."""
        owner = "FactorTransferLoss"
        check_trained(owner, self.paraphraser.trained)
        check_floating(owner, student=student, teacher=teacher)
        check_shape(owner, "student", student, "b c h w", c=self.student_channels)
        check_shape(owner, "teacher", teacher, "b c h w", c=self.teacher_channels)
        check_same_batch(owner, "student", student, "teacher", teacher)
        origin = student.dtype
        with full_precision(student):
            student, teacher = promote(student, teacher)
            with torch.no_grad():
                factors = encode(self.paraphraser.encoder, teacher, teacher.dtype)
            return factor_transfer(
                encode(self.translator, student, origin),
                factors,
                p=self.p,
                reduction=reduction or self.reduction,
                weight=weight,
            )


def encoder(channels: int, factors: int) -> nn.ModuleList:
    """Return three 3x3 convolutions from `channels` to `factors`."""
    sizes = ((channels, channels), (channels, factors), (factors, factors))
    return nn.ModuleList([nn.Conv2d(*size, 3, padding=1) for size in sizes])


def encode(layers: nn.ModuleList, x: Tensor, origin: torch.dtype) -> Tensor:
    """Apply the convolutions, each followed by a leaky ReLU; `origin` is the dtype that the user passed."""
    x = limit(x, origin)
    for layer in layers:
        x = F.leaky_relu(convolve(cast(nn.Conv2d, layer), x), SLOPE, inplace=True)
    return x
