"""Distillation with `transformers.Trainer`: a subclass whose model is the Distiller."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term

CLASSES, VOCABULARY, LENGTH = 3, 60, 12


class DistillationTrainer(Trainer):
    """A Trainer whose `model` is a Distiller; batches are mappings with the entry "labels"."""

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        output = model(arguments, inputs, step=self.state.global_step)
        if not return_outputs:
            return output.total
        # For `compute_metrics` and `predict`: the logits of the student.
        return output.total, {"logits": self.model.student(**arguments)["logits"]}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save copies, because safetensors refuses tied weights, such as an output matrix that is the embedding."""
        weights = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: value.clone() for name, value in weights.items()})


def bert(width: int, layers: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=CLASSES, **sizes)
    )


def make_sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sentences of random length; the class is the third of the vocabulary from which most tokens are."""
    generator = torch.Generator().manual_seed(seed)
    sentences = []
    for _ in range(count):
        label = torch.randint(CLASSES, (), generator=generator)
        own = torch.randint(20, (LENGTH,), generator=generator) + 20 * label
        other = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        tokens = torch.where(torch.rand(LENGTH, generator=generator) < 0.5, own, other)
        mask = (torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (), generator=generator)).long()
        sentences.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": label})
    return sentences


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    torch.manual_seed(0)
    data, new = make_sentences(768, seed=0), make_sentences(256, seed=1)
    taps = {"logits": OUTPUT["logits"]}
    labels = Term(nn.CrossEntropyLoss(), student="logits", target="labels")
    soft = Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits")
    teacher, student = bert(64, layers=2), bert(32, layers=1)

    def fit(distiller: Distiller, folder: str) -> tuple[float, float]:
        arguments = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=32, learning_rate=3e-3, label_names=["labels"],
            remove_unused_columns=False, logging_steps=24, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            distiller, arguments, train_dataset=data, eval_dataset=new, compute_metrics=accuracy
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        return before, trainer.evaluate()["eval_accuracy"]

    with tempfile.TemporaryDirectory() as folder:
        fit(Distiller(StudentAdapter(teacher, taps), {}, Objective({"labels": labels})), folder)
        objective = Objective({"labels": labels, "soft": soft})
        distiller = Distiller(StudentAdapter(student, taps), {"large": TeacherAdapter(teacher, taps)}, objective)
        before, after = fit(distiller, folder)
        student.save_pretrained(folder)  # a plain transformers model
    print(f"accuracy of the student: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
