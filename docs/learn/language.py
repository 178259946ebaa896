"""Distill a causal language model of characters, on the documentation of Python's standard library."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tutorial import Lesson, Row, count, docstrings, dots, main

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term, TrainConfig, train

LENGTH, VOCABULARY = 48, 96
TRAINING = ("argparse", "asyncio", "collections", "datetime", "decimal", "email.message", "fractions", "functools", "logging", "pathlib", "random", "shutil", "socket", "statistics", "subprocess", "typing", "unittest", "zipfile")  # fmt: skip
NEW = ("difflib", "doctest", "heapq", "tarfile", "threading")


# [text]
def windows(text: str) -> Tensor:
    """Rows of 48 characters and the one after them; a character is a number below 96."""
    codes = torch.tensor([min(max(ord(letter) - 31, 0), VOCABULARY - 1) if letter != "\n" else 0 for letter in text])
    return codes.unfold(0, LENGTH + 1, LENGTH)


# [model]
class LanguageModel(nn.Module):
    """A decoder-only transformer: logits `(b, n, 96)` of the next character at each position."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(characters.shape[1])
        return self.head(self.blocks(self.characters(characters) + self.positions, mask=mask, is_causal=True))


# [measure]
def next_character(logits: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of each character given those before it."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    return math.exp(next_character(model.eval()(rows[:, :-1]), rows[:, 1:]).item())


# [distill]
TAPS = {"logits": OUTPUT}


def trained(model: nn.Module, teacher: nn.Module | None, rows: Tensor, *, steps: int, seed: int) -> nn.Module:
    terms = {"text": Term(next_character, student="logits", target="target")}
    if teacher is not None:
        soft = SoftTargetLoss(temperature=1.0, dim=-1)  # the characters are the last dimension
        terms["soft"] = Term(soft, student="logits", teacher="logits")
    teachers = {} if teacher is None else {"large": TeacherAdapter(teacher, TAPS)}
    distiller = Distiller(StudentAdapter(model, TAPS), teachers, Objective(terms))
    loader = DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch_size=24, shuffle=True, drop_last=True)
    config = TrainConfig(max_steps=steps, optimizer="adamw", lr=4e-3, warmup_steps=20, clip_norm=1.0, seed=seed)
    train(distiller, loader, config)
    return model


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (30, 1) if quick else (400, 2)
    rows, new = windows(docstrings(TRAINING)), windows(docstrings(NEW))
    new = new[: 100 if quick else 400]
    measured: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = trained(LanguageModel(64, 2), None, rows, steps=2 * steps, seed=seed)
        measured.setdefault("teacher", []).append(perplexity(teacher, new))
        for name, given in (("student alone", None), ("student distilled", teacher)):
            torch.manual_seed(100 + seed)
            student = LanguageModel(16, 1)
            measured.setdefault("student before training", [])
            if given is None:
                measured["student before training"].append(perplexity(student, new))
            trained(student, given, rows, steps=steps, seed=seed)
            measured.setdefault(name, []).append(perplexity(student, new))
    sizes = {"teacher": count(teacher), "student": count(student)}
    rows_of_table = [Row(name, values, sizes[name.split()[0]]) for name, values in measured.items()]
    numbers = {"characters to train on": float(rows.numel()), "new characters": float(new.numel())}
    return Lesson("perplexity per character", rows_of_table, numbers=numbers)


def draw(figure: Figure, lesson: Lesson) -> None:
    trained_models = [row for row in lesson.rows if "before" not in row.model]
    dots(figure, Lesson(lesson.measure, trained_models))


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 2.2))
