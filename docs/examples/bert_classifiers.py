"""A BERT classifier teaches a smaller one; batches are mappings, as those of Hugging Face data sets."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

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

CLASSES, VOCABULARY, LENGTH = 3, 60, 12


def bert(width: int, layers: int) -> BertForSequenceClassification:
    """A classifier with random weights; `from_pretrained` loads real ones."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=CLASSES, **sizes)
    return BertForSequenceClassification(config)


def make_sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sentences of random length; the class is the third of the vocabulary from which most words are."""
    generator = torch.Generator().manual_seed(seed)
    sentences = []
    for _ in range(count):
        label = torch.randint(CLASSES, (), generator=generator)
        own = torch.randint(20, (LENGTH,), generator=generator) + 20 * label
        other = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        words = torch.where(torch.rand(LENGTH, generator=generator) < 0.5, own, other)
        mask = (torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (), generator=generator)).long()
        sentences.append({"input_ids": words * mask, "attention_mask": mask, "labels": label})
    return sentences


def accuracy(model: nn.Module, sentences: list[dict[str, Tensor]]) -> float:
    (batch,) = DataLoader(sentences, batch_size=len(sentences))
    labels = batch.pop("labels")
    with torch.no_grad():
        return (model.eval()(**batch).logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    new = make_sentences(512, seed=1)
    loader = DataLoader(make_sentences(768, seed=0), batch_size=32, shuffle=True)
    teacher, student = bert(64, layers=3), bert(32, layers=1)

    # The entries of a batch that the student's `forward` names are its inputs; "labels" is a target because a term reads it.
    config = TrainConfig(epochs=3, optimizer="adamw", lr=2e-3, warmup_steps=10)
    labels = Term(nn.CrossEntropyLoss(), student="logits", target="labels")
    adapter = StudentAdapter(teacher, {"logits": OUTPUT["logits"]})
    train(Distiller(adapter, {}, Objective({"labels": labels})), loader, config)
    print(f"accuracy of the teacher: {accuracy(teacher, new):.3f}")

    terms = {
        "labels": labels,
        "soft": Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits"),
        "class_token": Term(HintLoss(), student="class_token", teacher="class_token", project="auto", weight=0.1),
    }

    def taps(layer: int) -> dict[str, object]:
        return {"class_token": f"bert.encoder.layer.{layer}[:, 0]", "logits": OUTPUT["logits"]}

    before = accuracy(student, new)
    large = TeacherAdapter(teacher, taps(2))
    distiller = Distiller(StudentAdapter(student, taps(0)), {"large": large}, Objective(terms))
    config = TrainConfig(epochs=6, optimizer="adamw", lr=2e-3, warmup_steps=10)
    train(distiller, loader, config, hooks=[lambda event: event.step % 24 or print(event.step, event.terms)])
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, new):.3f}")


if __name__ == "__main__":
    main()
