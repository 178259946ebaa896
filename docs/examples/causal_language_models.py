"""A causal language model teaches a smaller one: token soft targets, from logits and from hidden states."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term
from kdlib.functional import linear_soft_target

VOCABULARY, LENGTH = 64, 24


def llama(width: int, layers: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, pad_token_id=0, **sizes))


def make_batch(count: int, seed: int) -> dict[str, Tensor]:
    """Sentences in which each word depends on the last one, padded on the right."""
    follows = (4 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))).softmax(1)
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(VOCABULARY, (count,), generator=generator)]
    while len(words) < LENGTH:
        words.append(torch.multinomial(follows[words[-1]], 1, generator=generator)[:, 0])
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    tokens = torch.stack(words, dim=1)
    return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens.where(mask, -100)}


def next_word(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each word given the words before it; -100 marks padding."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def fit(distiller: Distiller, steps: int) -> None:
    optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=5e-3)
    distiller.train()
    for step in range(steps):
        batch = make_batch(32, seed=step)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}  # keyword arguments of the models
        output = distiller(inputs, batch)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        if step % 30 == 0:
            print(f"step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in output.terms.items()))


def loss_on_new_text(model: nn.Module) -> float:
    batch = make_batch(128, seed=10_000)
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def main() -> None:
    torch.manual_seed(0)
    teacher, student = llama(64, layers=2), llama(32, layers=1)
    taps = {"hidden": "model.norm", "logits": OUTPUT["logits"]}
    words = Term(next_word, student="logits", target="labels")
    fit(Distiller(StudentAdapter(teacher, taps), {}, Objective({"words": words})), steps=90)
    print(f"loss of the teacher on new text: {loss_on_new_text(teacher):.3f}")

    def from_hidden(hidden: Tensor, teacher_hidden: Tensor, *, mask: Tensor) -> Tensor:
        """The same as soft targets of the logits, which never exist as a whole: for vocabularies of 100,000 words."""
        return linear_soft_target(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, mask=mask)

    soft = SoftTargetLoss(temperature=1.0, dim=-1)
    terms = {
        "words": words,
        "logits": Term(soft, student="logits", teacher="logits", mask="attention_mask"),
        "hidden": Term(from_hidden, student="hidden", teacher="hidden", mask="attention_mask"),
    }
    before = loss_on_new_text(student)
    fit(Distiller(StudentAdapter(student, taps), {"large": TeacherAdapter(teacher, taps)}, Objective(terms)), steps=90)
    print(f"loss of the student on new text: {before:.3f} -> {loss_on_new_text(student):.3f}")


if __name__ == "__main__":
    main()
