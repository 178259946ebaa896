"""Distill a BERT classifier on lines from the documentation of Python: of which topic is a line?"""

import re
import zlib

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
from tutorial import Lesson, Row, count, docstrings, dots, main

from kdlib import (
    OUTPUT,
    Distiller,
    HintLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    train,
)

TOPICS = {
    "input and output": ("asyncio",),
    "decimal numbers": ("decimal",),
    "tests": ("unittest", "unittest.mock"),
    "logs": ("logging", "logging.handlers"),
    "files": ("pathlib", "shutil", "tarfile", "zipfile"),
    "statistics": ("statistics", "random", "fractions"),
}
LENGTH, VOCABULARY, LABELED = 16, 1500, 200
Line = dict[str, Tensor]


# [data]
def encode(text: str, topic: int) -> Line:
    """The words as numbers: a hash in place of a trained tokenizer. 1 is the class token, 0 is padding."""
    words = re.findall(r"[a-z]+", text.lower())[: LENGTH - 1]
    numbers = [1] + [2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in words]
    padded = torch.tensor(numbers + [0] * (LENGTH - len(numbers)))
    return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": torch.tensor(topic)}


def lines() -> tuple[list[Line], list[Line]]:
    """Lines to train on and new ones; a line that is in the documentation twice is taken once."""
    found: dict[str, int] = {}
    for topic, modules in enumerate(TOPICS.values()):
        for line in docstrings(modules).splitlines():
            if len(line.split()) >= 6:
                found.setdefault(line.strip(), topic)
    encoded = [encode(text, topic) for text, topic in found.items()]
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0)).tolist()
    return [encoded[i] for i in order[:2000]], [encoded[i] for i in order[2000:]]


# [models]
def bert(width: int, layers: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=len(TOPICS), **sizes)
    return BertForSequenceClassification(config)


# [measure]
@torch.no_grad()
def accuracy(model: nn.Module, data: list[Line]) -> float:
    (batch,) = DataLoader(data, batch_size=len(data))
    labels = batch.pop("labels")
    return 100 * (model.eval()(**batch).logits.argmax(1) == labels).double().mean().item()


# [terms]
def taps(layer: int) -> dict[str, object]:
    return {"class_token": f"bert.encoder.layer.{layer}[:, 0]", "logits": OUTPUT["logits"]}


def terms(*names: str) -> dict[str, Term]:
    every = {
        "labels": Term(nn.CrossEntropyLoss(), student="logits", target="labels"),
        "soft": Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits"),
        "class_token": Term(HintLoss(), student="class_token", teacher="class_token", project="auto", weight=0.5),
    }
    return {name: every[name] for name in names}


def fit(
    model: nn.Module,
    layer: int,
    teachers: dict[str, nn.Module],
    used: dict[str, Term],
    data: list[Line],
    steps: int,
    seed: int,
    lr: float = 4e-3,
) -> None:
    adapters = {name: TeacherAdapter(teacher, taps(1)) for name, teacher in teachers.items()}
    distiller = Distiller(StudentAdapter(model, taps(layer)), adapters, Objective(used))
    loader = DataLoader(data, batch_size=50, shuffle=True, drop_last=True)
    train(distiller, loader, TrainConfig(max_steps=steps, optimizer="adamw", lr=lr, warmup_steps=20, seed=seed))


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (25, 1) if quick else (300, 2)
    data, new = lines()
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        models = {"teacher, 2000 labels": (teacher := bert(64, layers=2))}
        fit(teacher, 1, {}, terms("labels"), data, steps, seed, lr=2e-3)
        large = {"large": teacher}
        runs = (
            (f"student alone, {LABELED} labels", {}, ("labels",), data[:LABELED]),
            ("student distilled, no labels", large, ("soft",), data),
            ("student distilled, no labels, with class token", large, ("soft", "class_token"), data),
        )
        for name, teachers, used, given in runs:
            torch.manual_seed(100 + seed)
            models[name] = student = bert(32, layers=1)
            fit(student, 0, teachers, terms(*used), given, steps, seed)
        for name, model in models.items():
            rows.setdefault(name, []).append(accuracy(model, new))
    measured = [Row(name, values, count(models[name])) for name, values in rows.items()]
    return Lesson("accuracy, %", measured, numbers={"new lines": len(new)})


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw)
