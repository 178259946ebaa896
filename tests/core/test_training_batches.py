"""The batches that training accepts, and errors of its arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.training import TrainConfig, TrainEvent, train
from tests.core.training_toys import Toy, batches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distiller": nn.Linear(6, 3)}, "train: distiller must be a Distiller, got Linear"),
        ({"config": {"epochs": 1}}, "train: config must be a TrainConfig, got dict"),
        ({"loader": None}, "train: loader must be an iterable of batches, got NoneType"),
        ({"hooks": print}, "train: hooks must be a sequence of callables, got builtin_function_or_method"),
        ({"hooks": [3]}, r"train: hooks\[0\] must be callable, got int"),
        # A tensor of two images would unpack to inputs and targets.
        ({"loader": [torch.zeros(2, 6)]}, r"train: loader must yield \(inputs, targets\), got a Tensor"),
        (
            {"loader": [(torch.zeros(2, 6), {}, {})]},
            r"train: loader must yield \(inputs, targets\), got 3 items; set Train",
        ),
        (
            {"loader": [(torch.zeros(2, 6), 3)]},
            "train: loader: targets must be a mapping of names to tensors or None, got int",
        ),
        (
            {"loader": [{"image": torch.zeros(2, 6), "label": 1}]},
            r"loader yields mappings of 'image', 'label', but the student's forward needs 'input'; set TrainConfig\(split_b",
        ),
        (
            {"config": TrainConfig(epochs=1, split_batch=lambda batch: batch[0])},
            r"train: split_batch must return \(inputs, targets\), got a Tensor",
        ),
    ],
)
def test_train_names_the_argument_that_is_wrong(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"distiller": Toy(), "loader": batches(1), "config": TrainConfig(epochs=1), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        train(given.pop("distiller"), given.pop("loader"), given.pop("config"), **given)


class Scaled(nn.Module):
    """A network with two named inputs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(6, 3)
        nn.init.constant_(self.linear.weight, factor)
        nn.init.zeros_(self.linear.bias)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.linear(image if scale is None else image * scale)


@pytest.mark.parametrize("kind", ["tuple", "keywords", "mapping", "split"])
def test_batches_of_several_named_inputs(kind: str) -> None:
    """All kinds of batches give the same weights; a target that a term reads is no input."""
    images, scale, wanted = torch.ones(4, 6), torch.full((4, 1), 0.5), torch.zeros(4, 3)
    made = {
        "tuple": ((images, scale), {"wanted": wanted}),
        "keywords": ({"scale": scale, "image": images}, {"wanted": wanted}),
        "mapping": {"wanted": wanted, "other": "a name", "scale": scale, "image": images},
        "split": (images, scale, wanted),
    }
    terms = {
        "hint": Term(HintLoss(), student="out", teacher="out"),
        "mse": Term(nn.MSELoss(), student="out", target="wanted"),
    }
    student, teacher = StudentAdapter(Scaled(1.0), {"out": OUTPUT}), TeacherAdapter(Scaled(2.0), {"out": OUTPUT})
    distiller = Distiller(student, {"big": teacher}, Objective(terms))
    split = (lambda batch: (batch[:2], {"wanted": batch[2]})) if kind == "split" else None
    seen: list[TrainEvent] = []
    train(distiller, [made[kind]] * 2, TrainConfig(epochs=1, lr=0.01, split_batch=split), hooks=[seen.append])
    # The student returns 6 * 0.5 * 1, the teacher twice as much.
    assert seen[0].terms == {"hint": 9.0, "mse": 9.0}
    assert seen[1].images_per_second > 0
    assert student.model.linear.weight.max().item() != 1.0


def test_a_tensor_beside_the_inputs_is_the_target() -> None:
    terms = {"ce": Term(nn.CrossEntropyLoss(), student="out", target="target")}
    distiller = Distiller(StudentAdapter(nn.Linear(6, 3), {"out": OUTPUT}), {}, Objective(terms))
    loader = DataLoader(TensorDataset(torch.randn(8, 6), torch.arange(8) % 3), batch_size=4)
    assert train(distiller, loader, TrainConfig(epochs=1)).step == 2


def test_lengths() -> None:
    assert train(Toy(), batches(), TrainConfig(epochs=5, max_steps=7)).step == 7
    assert train(Toy(), batches(), TrainConfig(max_steps=12)).epoch == 2

    class Unsized:
        def __iter__(self) -> Any:
            return iter(batches(3))

    assert train(Toy(), Unsized(), TrainConfig(max_steps=7)).epoch == 2

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from batches(3)

    assert train(Toy(), DataLoader(Endless(), batch_size=None), TrainConfig(max_steps=4)).step == 4
    with pytest.raises(ValueError, match="loader must have a length when max_steps is not given"):
        train(Toy(), Unsized(), TrainConfig(epochs=1))
    with pytest.raises(ValueError, match="loader must yield at least one batch"):
        train(Toy(), [], TrainConfig(epochs=1))


@pytest.mark.parametrize("place", ["loader", "sampler", "batch_sampler", "sampler of the batch_sampler"])
def test_the_epoch_is_set_on_loader_and_samplers(place: str) -> None:
    class Listening(list):  # type: ignore[type-arg]
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    class Order(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    class Batches(torch.utils.data.BatchSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    images, sampler = [image for batch, _ in batches(2) for image in batch], Order(range(16))
    options: dict[str, Any] = {
        "sampler": {"sampler": sampler, "batch_size": 8},
        "batch_sampler": {"batch_sampler": Batches(range(16), 8, False)},
        "sampler of the batch_sampler": {"batch_sampler": torch.utils.data.BatchSampler(sampler, 8, False)},
    }
    collate = {"collate_fn": lambda items: (torch.stack(items), {})}
    loader = Listening(batches(2)) if place == "loader" else DataLoader(images, **options[place], **collate)
    train(Toy(), loader, TrainConfig(epochs=3))
    assert sorted(set(epochs)) == [0, 1, 2]


@pytest.mark.parametrize(("accumulate", "last"), [(1, 2), (3, 2)])
def test_a_batch_that_batchnorm_cannot_normalize_is_named(accumulate: int, last: int) -> None:
    data = TensorDataset(torch.randn(17, 6))
    loader = DataLoader(data, batch_size=8, collate_fn=lambda items: (torch.stack([x for (x,) in items]), {}))
    toy, message = (
        Toy(),
        (
            f"train: BatchNorm in training mode needs more than one value per channel, but batch {last} of epoch 0 has 1 sample; "
            r"use DataLoader\(drop_last=True\) or another batch size$"
        ),
    )
    with pytest.raises(ValueError, match=message):
        train(toy, loader, TrainConfig(epochs=1, accumulate=accumulate))
    toy.layers[1] = nn.LayerNorm(8)
    assert train(toy, loader, TrainConfig(epochs=1)).step == 3
