"""Losses for faces: the contract of every loss, its arguments, and two processes."""

import gc
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib import Objective, Term
from kdlib.testing import check_loss
from kdlib_faces import losses as package
from kdlib_faces.heads import ArcFaceHead
from kdlib_faces.losses import AdaptiveCentersLoss, EvaluationOrientedLoss, MarginDistillLoss, TripletDistillLoss
from tests.faces.reference_face_losses import CENTERS, IDENTITIES, STUDENT, TEACHER, WEIGHT, B, D, N, random


def warm(loss: nn.Module) -> nn.Module:
    """The same loss after one batch, in evaluation mode, in which no buffer changes."""
    loss.double()(random(B, D, seed=8), random(B, D, seed=9), target=IDENTITIES)
    return loss.eval()


MAKERS = {
    "margin": lambda: MarginDistillLoss(N, D, scale=8.0, centers=CENTERS),
    "triplet": lambda: TripletDistillLoss(),
    "triplet angle": lambda: TripletDistillLoss(distance="angle"),
    "triplet semihard": lambda: TripletDistillLoss(mining="semihard"),
    "evaluation": lambda: EvaluationOrientedLoss(temperature=0.2, num_hard_negatives=10),
    "adaptive arc": lambda: AdaptiveCentersLoss(N, D, scale=8.0),
    "adaptive cos": lambda: AdaptiveCentersLoss(N, D, scale=8.0, head="cosface", centers=CENTERS),
}
# In training mode their buffers (thresholds, centers) depend on the student, so that finite differences are wrong.
STATEFUL = {"evaluation", "adaptive arc", "adaptive cos"}


def test_every_loss_is_tested() -> None:
    modules = {name for name in package.__all__ if inspect.isclass(getattr(package, name))}
    assert modules == {type(make()).__name__ for make in MAKERS.values()}
    assert set(package.__all__) - modules == {
        "adapted_centers", "centers_from", "evaluation_oriented", "margin_distill", "negative_thresholds",
        "triplet_distill",
    }  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
class TestEveryLoss:
    def test_contract(self, name: str) -> None:
        per_sample = name.startswith(("margin", "adaptive"))
        expected, excluded = 29 if per_sample else 27, ["gradcheck"] if name in STATEFUL else []
        ran = check_loss(MAKERS[name](), STUDENT, TEACHER, target=IDENTITIES, exclude=excluded)
        assert len(ran) == expected - len(excluded)
        loss = warm(MAKERS[name]()).float()
        assert len(check_loss(loss, STUDENT, TEACHER, target=IDENTITIES)) == expected
        assert type(loss).per_sample is per_sample

    def test_compiles_without_graph_breaks(self, name: str) -> None:
        student = STUDENT.float().requires_grad_()
        results = []
        for compiled in (False, True):
            loss = MAKERS[name]()
            call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
            value = call(student, TEACHER.float(), target=IDENTITIES)
            results.append((value, *torch.autograd.grad(value, student), *loss.buffers()))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            *[(torch.float32, value) for value in (1e-40, 1e-20, 1e30, 3e38)],
            *[(torch.float16, value) for value in (300.0, 60000.0, 1e-7, 1e-2)],
            (torch.bfloat16, 1e38),
            (torch.float64, 1e300),
        ],
    )
    def test_finite_for_any_finite_embedding(self, name: str, value: float, dtype: torch.dtype) -> None:
        loss = MAKERS[name]()
        student = (value * STUDENT.sign()).to(dtype).requires_grad_()
        loss_value = loss(student, (value * TEACHER.sign()).to(dtype), target=IDENTITIES)
        loss_value.backward()
        assert torch.isfinite(loss_value)
        assert torch.isfinite(student.grad).all()
        assert all(torch.isfinite(buffer).all() for buffer in loss.buffers())
        if 1e-12 < value < 6e4 and dtype != torch.float16:
            assert student.grad.any()

    def test_common_offset(self, name: str) -> None:
        student = (1000 + STUDENT).float().requires_grad_()
        loss_value = MAKERS[name]()(student, (1000 + TEACHER).float(), target=IDENTITIES)
        loss_value.backward()
        exact = MAKERS[name]().double()(1000 + STUDENT, 1000 + TEACHER, target=IDENTITIES)
        assert torch.isfinite(student.grad).all()
        assert loss_value.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-4)

    @settings(max_examples=15)
    @given(order=st.permutations(range(B)))
    def test_invariance_to_the_order(self, name: str, order: list[int]) -> None:
        losses = MAKERS[name]().double(), MAKERS[name]().double()
        for _ in range(2):
            one = losses[0](STUDENT, TEACHER, target=IDENTITIES)
            two = losses[1](STUDENT[order], TEACHER[order], target=IDENTITIES[order])
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
        for a, b in zip(losses[0].buffers(), losses[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_in_an_objective(self, name: str) -> None:
        term = Term(MAKERS[name](), student="embedding", teacher="embedding", target="identity")
        objective = Objective({"faces": term})
        student = STUDENT.float().requires_grad_()
        features = {"general": {"embedding": TEACHER.float()}}
        out = objective({"embedding": student}, features, {"identity": IDENTITIES})
        out.total.backward()
        expected = MAKERS[name]()(STUDENT.float(), TEACHER.float(), target=IDENTITIES.to(torch.uint8))
        torch.testing.assert_close(out.total.detach(), expected)
        assert student.grad.any()
        assert not list(objective.parameters())
        before = {key: value.clone() for key, value in objective.state_dict().items()}
        objective.report({"embedding": student}, features, {"identity": IDENTITIES})
        assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"student": STUDENT.long()}, "student must be a floating-point tensor"),
            ({"teacher": TEACHER.long()}, "teacher must be a floating-point tensor"),
            ({"student": STUDENT.unsqueeze(2)}, r"student must be \(b, d\), got \(12, 6, 1\)"),
            ({"teacher": TEACHER[1:]}, "teacher must"),
            ({"target": IDENTITIES[1:]}, r"must be .*12.*, got .*11"),
            ({"target": IDENTITIES.float()}, "must be .*whole numbers, got torch.float32"),
            ({"weight": torch.ones(3)}, r"weight must be \(b,\) = \(12,\), got \(3,\)"),
            ({"reduction": "sum"}, r"reduction must be .*got 'sum'"),
        ],
    )
    def test_invalid_calls(self, name: str, change: dict[str, Any], words: str) -> None:
        loss = MAKERS[name]()
        with pytest.raises(
            (TypeError, ValueError), match=rf"(?i)^({type(loss).__name__[:5]}\w+|\w+face_loss): .*{words}"
        ):
            loss(**{"student": STUDENT, "teacher": TEACHER, "target": IDENTITIES, **change})


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "words"),
    [
        (MarginDistillLoss, (0, 4), {}, "num_identities must be"),
        (MarginDistillLoss, (4, 2.5), {}, "embedding_dim must be"),
        (MarginDistillLoss, (4, 4), {"scale": 0.0}, "scale must be"),
        (MarginDistillLoss, (4, 4), {"min_margin": -0.1}, "min_margin must be"),
        (MarginDistillLoss, (4, 4), {"max_margin": 0.1}, "max_margin must be .* >= 0.2"),
        (MarginDistillLoss, (4, 4), {"reduction": "sum"}, "reduction must be one of"),
        (MarginDistillLoss, (4, 4), {"centers": torch.ones(4, 5)}, r"centers must be \(n, d\) with n = 4 and d = 4"),
        (MarginDistillLoss, (2, 2), {"centers": torch.eye(2) * torch.inf}, "centers must be finite"),
        (MarginDistillLoss, (2, 2), {"centers": torch.tensor([[1.0, 0], [0, 0]])}, ".*no row of zeros, got row 1"),
        (TripletDistillLoss, (), {"distance": "l1"}, "distance must be one of 'squared', 'angle'"),
        (TripletDistillLoss, (), {"mining": "all"}, "mining must be one of 'hardest', 'semihard'"),
        (TripletDistillLoss, (), {"max_margin": 0.1}, "max_margin must be .* >= 0.2"),
        (TripletDistillLoss, (), {"min_margin": 4, "max_margin": 4, "distance": "angle"}, "min_margin must be .*3.14"),
        (EvaluationOrientedLoss, (), {"rates": ()}, "rates must hold at least one number"),
        (EvaluationOrientedLoss, (), {"rates": (0.0,)}, r"rates\[0\] must be .* > 0"),
        (EvaluationOrientedLoss, (), {"rates": "0.1"}, "rates must be a sequence"),
        (EvaluationOrientedLoss, (), {"temperature": 0.0}, "temperature must be"),
        (EvaluationOrientedLoss, (), {"num_hard_negatives": 2.0}, "num_hard_negatives must be a whole number"),
        (EvaluationOrientedLoss, (), {"positive_weight": -1.0}, "positive_weight must be"),
        (EvaluationOrientedLoss, (), {"momentum": 0.0}, "momentum must be"),
        (AdaptiveCentersLoss, (0, 4), {}, "num_identities must be"),
        (AdaptiveCentersLoss, (4, 4), {"head": "adaface"}, "head must be one of 'arcface'"),
        (AdaptiveCentersLoss, (4, 4), {"margin": 3.2}, "margin must be .*3.14"),
        (ArcFaceHead, (4, 3), {"margin": 3.2}, r"margin must be a finite number and >= 0 and <= 3\.14"),
        (AdaptiveCentersLoss, (4, 4), {"centers": torch.ones(3, 4)}, "centers must be"),
    ],
)
def test_invalid_arguments(kind: Any, arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: {words}"):
        kind(*arguments, **options)


@pytest.mark.parametrize(
    ("kind", "arguments", "options"),
    [
        (MarginDistillLoss, (N, D), {"scale": 8.0, "min_margin": 0.25, "max_margin": 0.5, "centers": CENTERS}),
        (TripletDistillLoss, (), {"min_margin": 0.25, "max_margin": 0.5}),
        (EvaluationOrientedLoss, (), {"rates": (0.5, 0.25, 1e-4), "temperature": 0.25, "num_hard_negatives": 10}),
        (EvaluationOrientedLoss, (), {"positive_weight": 0.5, "negative_weight": 2.0, "momentum": 0.5}),
        (AdaptiveCentersLoss, (N, D), {"scale": 8.0, "margin": 0.25}),
    ],
)
def test_numpy_numbers(kind: Any, arguments: tuple[int, ...], options: dict[str, Any]) -> None:
    def converted(value: Any) -> Any:
        if isinstance(value, tuple):
            return np.array(value, dtype=np.float32)
        return value if isinstance(value, Tensor) else np.int16(value) if isinstance(value, int) else np.float32(value)

    plain = kind(*arguments, **options)
    loss = kind(*map(converted, arguments), **{name: converted(value) for name, value in options.items()})
    assert repr(loss) == repr(plain)
    expected = plain(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
    assert torch.equal(loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES), expected)


def test_state_of_another_number_of_identities() -> None:
    with pytest.raises(RuntimeError, match=r"MarginDistillLoss: centers must be .* = \(4, 6\), got \(5, 6\)"):
        MarginDistillLoss(N, D).load_state_dict(MarginDistillLoss(N + 1, D).state_dict())


# --- two processes ---------------------------------------------------------------------------------------------------

SPLITS = {"uneven": 5, "one empty": 0}  # rows of the first process
GATHERED = {
    "triplet": lambda: TripletDistillLoss(gather=True),
    "triplet angle": lambda: TripletDistillLoss(distance="angle", mining="semihard", gather=True),
    "evaluation": lambda: EvaluationOrientedLoss(temperature=0.2, num_hard_negatives=10, gather=True),
    "adaptive": lambda: AdaptiveCentersLoss(N, D, scale=8.0),
}


def steps(make: Any, rows: slice) -> dict[str, Tensor]:
    """Three steps of a loss on some rows: the values, the gradients and the buffers."""
    loss, results = make().double(), {}
    for step in range(3):
        student = random(B, D, seed=step)[rows].requires_grad_()
        teacher, target = random(B, D, seed=step + 50)[rows], IDENTITIES.roll(step)[rows]
        value = loss(student, teacher, target=target, weight=WEIGHT[rows] if step == 1 else None)
        value.backward()
        results[f"value {step}"], results[f"gradient {step}"] = value.detach(), student.grad
        results.update({f"{name} {step}": x.clone() for name, x in loss.named_buffers()})
    return results


def process(rank: int, directory: Path) -> None:
    """One of two processes that share each batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    results = {}
    for split, first in SPLITS.items():
        rows = slice(0, first) if rank == 0 else slice(first, B)
        results.update({f"{split}/{name}": steps(make, rows) for name, make in GATHERED.items()})
    torch.save(results, directory / f"rank{rank}.pt")
    gc.collect()  # a cycle would keep the group's threads until the interpreter exits
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error::UserWarning", __file__]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in (0, 1)]
    ends = [each.communicate(timeout=120)[1] for each in started]
    for each, errors in zip(started, ends, strict=True):
        assert each.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, make in GATHERED.items():
        expected = steps(make, slice(0, B))
        for split, first in SPLITS.items():
            results = [rank[f"{split}/{name}"] for rank in ranks]
            for key, value in expected.items():
                per_process = name == "adaptive" and not key.startswith("centers")  # the mean over its own samples
                if key.startswith("gradient") and not per_process:
                    # The mean of the two processes' gradients is the whole batch's.
                    torch.testing.assert_close(torch.cat([each[key] for each in results]) / 2, value)
                elif not per_process:
                    assert torch.equal(results[0][key], results[1][key]), f"{split}, {name}: {key} differs"
                    torch.testing.assert_close(results[0][key], value)
            if name == "adaptive":
                parts = [first * results[0]["value 0"], (B - first) * results[1]["value 0"]]
                torch.testing.assert_close(sum(parts) / B, expected["value 0"])


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
