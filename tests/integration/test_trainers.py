"""Distillation under the trainers and the techniques of `docs/trainers.md`: the student learns, the teacher stays fixed."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
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
from kdlib.schedules import cosine, piecewise

pytestmark = [
    # Warnings of these packages about themselves and about the machine.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate"),
]


def distiller(weight: float | Callable[[int], float] = 0.1) -> Distiller:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        teacher = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
        terms = {
            "angle": Term(AngularDistillLoss(form="cosine"), student="out", teacher="out"),
            "hint": Term(HintLoss(), student="middle", teacher="middle", project="auto", weight=weight),
        }
        made = Distiller(
            StudentAdapter(student, {"out": OUTPUT, "middle": "0"}),
            {"big": TeacherAdapter(teacher, {"out": OUTPUT, "middle": "0"})},
            Objective(terms),
        )
        made.infer(torch.randn(8, 6), {})  # creates the projections before the optimizer collects the parameters
    return made


def loader() -> "DataLoader[tuple[Tensor, ...]]":
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images), batch_size=16)


def loss_of(made: Distiller) -> float:
    made.eval()
    with torch.no_grad():
        return sum(float(made(images, {}).total) for (images,) in loader())


@pytest.fixture
def checked() -> Iterator[Distiller]:
    """A distiller whose loss must decrease and whose teacher must not change."""
    made = distiller()
    teacher = made.teachers["big"]
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    loss = loss_of(made)
    yield made
    assert loss_of(made) < 0.8 * loss
    after: dict[str, Tensor] = teacher.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Forget the settings of an earlier test, which accelerate keeps for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def test_a_plain_loop(checked: Distiller) -> None:
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)
    for _ in range(10):
        checked.train()
        for (images,) in loader():
            optimizer.zero_grad()
            checked(images, {}).total.backward()
            optimizer.step()


def test_a_lightning_module(checked: Distiller, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Distilled(lightning.LightningModule):  # type: ignore[misc, name-defined]  # known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.distiller = checked

        def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
            output = self.distiller(batch[0], {})
            self.log_dict({name: value.detach() for name, value in output.terms.items()})
            total: Tensor = output.total
            return total

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.distiller.trainable_parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    module = Distilled()
    trainer.fit(module, loader())
    assert set(trainer.callback_metrics) == {"angle", "hint"}
    (saved,) = tmp_path.rglob("*.ckpt")
    names = torch.load(saved, weights_only=True)["state_dict"]
    assert any(name.startswith("distiller.student.") for name in names)
    assert any(name.startswith("distiller.objective.projections.") for name in names)
    assert not any("teacher" in name.split(".")[1] for name in names)
    again = Distilled()
    again.load_state_dict(names)


def test_an_accelerate_loop(checked: Distiller) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)
    made, optimizer, batches = accelerator.prepare(checked, optimizer, loader())
    for _ in range(10):
        made.train()
        for (images,) in batches:
            optimizer.zero_grad()
            accelerator.backward(made(images, {}).total)
            optimizer.step()
    assert not any(name.startswith("teachers") for name in accelerator.unwrap_model(made).state_dict())


def test_accelerate_offloads_a_teacher(checked: Distiller) -> None:
    accelerate = pytest.importorskip("accelerate")
    teacher = checked.teachers["big"].model
    values = {name: value.clone() for name, value in teacher.state_dict().items()}
    expected = loss_of(checked)
    accelerate.cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in teacher.parameters())
    made, optimizer, batches = accelerate.Accelerator(cpu=True).prepare(
        checked, torch.optim.Adam(checked.trainable_parameters(), lr=1e-2), loader()
    )
    assert loss_of(made) == pytest.approx(expected)
    for _ in range(10):
        for (images,) in batches:
            optimizer.zero_grad()
            made(images, {}).total.backward()
            optimizer.step()
    result = train(made, [(images, {}) for (images,) in loader()], TrainConfig(epochs=1, lr=1e-3))
    assert result.total < 0.2 * expected
    assert all(parameter.is_meta for parameter in teacher.parameters())
    accelerate.hooks.remove_hook_from_submodules(teacher)
    assert all(torch.equal(value, values[name]) for name, value in teacher.state_dict().items())


def test_accelerate_in_bfloat16_saves_and_loads_its_state(checked: Distiller, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)
    made, optimizer, batches = accelerator.prepare(checked, optimizer, loader())

    def epochs(count: int) -> float:
        for _ in range(count):
            for (images,) in batches:
                optimizer.zero_grad()
                total = made(images, {}).total
                assert total.dtype == torch.float32
                accelerator.backward(total)
                optimizer.step()
        return total.item()

    epochs(5)
    accelerator.save_state(tmp_path, safe_serialization=True)
    straight = epochs(5)
    accelerator.load_state(tmp_path)
    assert epochs(5) == straight


def losses(made: Distiller, forward: Any) -> list[float]:
    optimizer = torch.optim.Adam(made.trainable_parameters(), lr=1e-2)
    found = []
    for step in range(10):
        for (images,) in loader():
            optimizer.zero_grad()
            total = forward(images, {}, step=step).total
            total.backward()
            optimizer.step()
            found.append(total.item())
    return found


@pytest.mark.parametrize("weight", [cosine(1.0, 0.1, 10), piecewise({0: 1.0, 4: 0.5})])
def test_a_distiller_with_a_schedule_compiles_to_one_graph(weight: Callable[[int], float]) -> None:
    torch._dynamo.reset()
    made, eager = distiller(weight), distiller(weight)
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(made, fullgraph=True, backend=count)
    assert losses(made, compiled) == pytest.approx(losses(eager, eager), rel=1e-5)
    assert graphs <= 4, "the step must be a symbol of the graph"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_step(checked: Distiller) -> None:
    torch._dynamo.reset()
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)

    @torch.compile(backend="aot_eager")
    def step(images: Tensor) -> Tensor:
        total: Tensor = checked(images, {}).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    for _ in range(10):
        for (images,) in loader():
            step(images)


def test_activation_checkpointing_of_the_layers(checked: Distiller) -> None:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    names = list(checked.state_dict())
    expected = losses(made := distiller(), made)
    wrapper.apply_activation_checkpointing(checked.student.model, check_fn=lambda layer: isinstance(layer, nn.Linear))
    assert losses(checked, checked) == pytest.approx(expected, rel=1e-6)
    assert list(checked.state_dict()) == names


def language_model(width: int, *, layers: int = 2) -> Any:
    """A small GPT-2 with random weights, whose output matrix is its embedding."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)


def language_distiller() -> Distiller:
    loss = SoftTargetLoss(temperature=1.0, dim=-1)
    adapters = (StudentAdapter(language_model(16), LANGUAGE_TAPS), TeacherAdapter(language_model(32), LANGUAGE_TAPS))
    words = Term(next_word, student="logits", target="labels")
    soft = Term(loss, student="logits", teacher="logits")
    return Distiller(adapters[0], {"big": adapters[1]}, Objective({"soft": soft, "words": words}))


LANGUAGE_TAPS = {"logits": OUTPUT["logits"], "block": "transformer.h.1"}


def next_word(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sentences() -> list[dict[str, Tensor]]:
    """Numbers that count up, which a model learns in a few steps."""
    words = (torch.randint(40, (64, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(8)) % 40
    return [{"input_ids": each, "attention_mask": torch.ones(8, dtype=torch.long), "labels": each} for each in words]


def hugging_face_trainer(made: Distiller, folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    script = Path(__file__).parents[2] / "docs" / "examples" / "hugging_face_trainer.py"
    Trainer = runpy.run_path(str(script))["DistillationTrainer"]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=4,
        logging_steps=1, label_names=["labels"], remove_unused_columns=False, report_to=[], disable_tqdm=True, use_cpu=True,
        **options,
    )  # fmt: skip
    return Trainer(made, arguments, train_dataset=sentences(), eval_dataset=sentences())


def test_a_trainer_of_transformers_resumes_with_tied_weights(tmp_path: Path) -> None:
    made = language_distiller()
    before = {name: value.clone() for name, value in made.teachers["big"].model.state_dict().items()}
    trainer = hugging_face_trainer(made, tmp_path, max_steps=12)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * loss
    predictions = trainer.predict(sentences()).predictions
    assert predictions.shape == (64, 8, 40)
    after = made.teachers["big"].model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert not any("teacher" in name for name in saved)
    resumed = language_distiller()
    hugging_face_trainer(resumed, tmp_path, max_steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(dict(resumed.student.named_parameters()), dict(made.student.named_parameters()))


def test_a_trainer_of_transformers_accumulates_gradients(tmp_path: Path) -> None:
    """Two batches of one step give the weights of one batch of twice the size."""
    made, other = language_distiller(), language_distiller()
    hugging_face_trainer(made, tmp_path / "one", max_steps=3, gradient_accumulation_steps=2).train()
    trainer = hugging_face_trainer(other, tmp_path / "two", max_steps=3)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 16
    trainer.train()
    torch.testing.assert_close(
        dict(made.student.named_parameters()), dict(other.student.named_parameters()), rtol=1e-3, atol=1e-4
    )


def test_activation_checkpointing_of_transformers() -> None:
    made, plain = language_distiller(), language_distiller()
    model = made.student.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    (batch,) = DataLoader(sentences(), batch_size=64)
    labels = {"labels": batch.pop("labels")}
    for each in (made, plain):
        each.train()
        each(batch, labels).total.backward()
    for one, two in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
