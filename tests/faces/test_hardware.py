"""Devices, precision, locks and records of commands."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from kdlib.training import TrainEvent, load_checkpoint
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware, find_hardware, share
from kdlib_faces._output import locked
from kdlib_faces.backbones import load_backbone
from kdlib_faces.caching.build import CacheConfig, build
from kdlib_faces.commands.photographs import faces_of_photographs
from kdlib_faces.teachers.onnx.runtime import providers_for
from kdlib_faces.teachers.open import open_onnx
from kdlib_faces.training.settings import TrainingConfig
from kdlib_faces.training.speed import SpeedAdvice
from tests.faces.cache_files import build_words, fails, make_faces, run, settings
from tests.faces.detector_graph import detector, put_photograph

SMALL = ("training.batch_size=4", "recipe.input_size=32", "recipe.width=0.25", "recipe.embedding_dim=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("hardware"))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs; the devices that were selected."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    return chosen


def train(folder: Path, output: Path, *words: object) -> list[object]:
    given = ["train", "--recipe", "student", "--data", folder / "faces.csv", "--output", output, "--quiet"]
    return [*given, *settings(*SMALL), *words]


def test_the_accelerator_is_the_default_and_processes_take_one_each(two_gpus, monkeypatch) -> None:
    assert find_hardware().device == torch.device("cuda:0")
    assert find_hardware("cuda:1").device == torch.device("cuda:1")
    assert find_hardware("cpu") == Hardware()
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert find_hardware("cuda") == Hardware(torch.device("cuda:1"), rank=3, count=4)
    assert two_gpus == [torch.device(f"cuda:{index}") for index in (0, 1, 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"has 2 cuda devices, .* pass --nproc-per-node 2"):
        find_hardware()
    with pytest.raises(InputError, match="must be a kind of device with several processes, such as cuda, got cuda"):
        find_hardware("cuda:1")
    with pytest.raises(InputError, match="must be below cuda:2"):
        find_hardware("cuda:2")


def test_a_device_that_this_machine_lacks_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    for name in ("xpu", "gpu", "cuda:x", ""):
        assert "--device must be one of cpu" in fails(capsys, *train(folder, tmp_path / "o", "--device", name))
    assert not (tmp_path / "o").exists()


def test_parts_cover_all_rows() -> None:
    rows = [row for rank in range(3) for row in share(7, Hardware(rank=rank, count=3))]
    assert rows == list(range(7))


def test_a_graph_runs_on_the_device_or_not_at_all(graph: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    installed = runtime.get_available_providers()
    with pytest.raises(InputError, match=f"no execution provider 'CUDAExecutionProvider' .* there are {installed[0]}"):
        open_onnx(graph, device=torch.device("cuda", 1))
    assert providers_for(torch.device("cuda", 1)) == [
        ("CUDAExecutionProvider", {"device_id": 1}),
        "CPUExecutionProvider",
    ]
    with pytest.raises(InputError, match="no execution provider of onnxruntime is known for hpu"):
        providers_for(torch.device("hpu"))


def test_precision_and_device_reach_the_cache_and_the_report(folder: Path, tmp_path: Path, capsys) -> None:
    words = build_words(folder, "general.pt", tmp_path / "c", "--amp", "bfloat16", "--device", "cpu")
    words.remove("--quiet")
    assert run(*words) == 0
    assert "device: cpu, " in (text := capsys.readouterr()).err
    assert ", bfloat16" in text.err
    verify = ["cache", "verify", tmp_path / "c", "--data", folder / "faces.csv", "--teacher", folder / "general.pt"]
    assert run(*verify, "--quiet") == 0
    assert "rows recomputed" in capsys.readouterr().out
    assert "contains another" in fails(capsys, *build_words(folder, "general.pt", tmp_path / "c"))
    words = ["evaluate", "--quiet", "--data", folder / "faces.csv", "--model", folder / "general.pt", "--workers", 1]
    for amp in ("bfloat16", "none"):
        assert run(*words, "--amp", amp, "--output", tmp_path / "report", *settings("replicates=10")) == 0
    assert len(list((tmp_path / "report" / "work").glob("*.npy"))) == 2


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the compiler, which takes long; the names of the compiled networks, once for each time that they run."""
    called: list[str] = []

    def compile_fast(module: torch.nn.Module) -> None:
        def call(*inputs: object, **named: object) -> object:
            called.append(type(module).__name__)
            return module._call_impl(*inputs, **named)

        module._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_fast)
    return called


def test_compile_reaches_the_networks_of_each_command(
    folder: Path, graph: Path, tmp_path: Path, capsys, compiled
) -> None:
    assert run(*build_words(folder, "general.pt", tmp_path / "plain", "--dtype", "float32")) == 0
    assert not compiled
    assert run(*build_words(folder, "general.pt", tmp_path / "fast", "--dtype", "float32", "--compile")) == 0
    assert set(compiled) == {"TeacherAdapter"}
    plain, fast = (tmp_path / name / "shard-00000.bin" for name in ("plain", "fast"))
    assert plain.read_bytes() == fast.read_bytes()
    words = build_words(folder, graph, tmp_path / "graph", "--compile")
    assert "--compile applies to networks of torch, got" in fails(capsys, *words)
    compiled.clear()
    words = ["evaluate", "--data", folder / "faces.csv", "--model", folder / "general.pt", *settings("replicates=10")]
    assert run(*words, "--model", graph, "--compile", "--output", tmp_path / "report") == 0
    assert set(compiled) == {"MobileFaceNet"}
    assert f"{graph.name}: not compiled, since onnxruntime runs it" in capsys.readouterr().err
    compiled.clear()
    crops = [str(path) for path in sorted(folder.glob("*.png"))[:2]]
    assert run("embed", *crops, "--model", folder / "general.pt", "--compile", "--output", tmp_path / "embed") == 0
    assert run("compare", *crops, "--model", folder / "general.pt", "--compile", "--device", "cpu") == 0
    assert compiled.count("MobileFaceNet") == 6  # each image and its mirror image; embed has both in one batch
    compiled.clear()
    assert run(*train(folder, tmp_path / "run", "--compile", *settings("training.steps=1"))) == 0
    assert set(compiled) == {"StudentAdapter"}


def test_workers_and_compiled_networks_make_the_students_of_a_plain_demo(tmp_path: Path, compiled) -> None:
    tiny = [f"{part}_{what}=3" for part in ("general", "age", "test") for what in ("identities", "images")]
    tiny += ["test_identities=8", "general_steps=1", "age_steps=1", "student_steps=2", "batch_size=4", "replicates=0"]
    tiny += ["deployment=none", "size=32", "student.width=0.25", "student.embedding_dim=16", "general_window=40"]
    assert run("demo", "--quiet", "--output", tmp_path / "plain", *settings(*tiny)) == 0
    assert not compiled
    words = ["demo", "--quiet", "--workers", 1, "--compile", "--output", tmp_path / "other"]
    assert run(*words, *settings(*tiny)) == 0
    assert "StudentAdapter" in compiled
    plain, other = (load_backbone(tmp_path / name / "student.safetensors") for name in ("plain", "other"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


def test_detectors_and_the_check_of_a_cache_run_on_the_device_or_not_at_all(
    folder: Path, graph: Path, tmp_path: Path, capsys, two_gpus
) -> None:
    (tmp_path / "photographs").mkdir()
    put_photograph(tmp_path / "photographs" / "1.png", {(1, 1): 250}, seed=0)
    words = [
        "align",
        tmp_path / "photographs",
        "--detector",
        detector(tmp_path / "d.onnx"),
        "--output",
        tmp_path / "crops",
    ]
    assert "no execution provider 'CUDAExecutionProvider'" in fails(capsys, *words)
    assert not (tmp_path / "crops").exists()
    assert run(*words, "--device", "cpu") == 0
    assert "device: cpu, " in capsys.readouterr().err
    photographs = [tmp_path / "photographs" / "1.png"]
    with pytest.raises(InputError, match="no execution provider 'CUDAExecutionProvider'"):  # of `embed` and `compare`
        faces_of_photographs("images", photographs, tmp_path / "d.onnx", "largest", torch.device("cuda", 0))
    assert run(*build_words(folder, graph, tmp_path / "cache", "--device", "cpu")) == 0
    words = ["cache", "verify", tmp_path / "cache", "--data", folder / "faces.csv", "--teacher", graph]
    assert "no execution provider 'CUDAExecutionProvider'" in fails(capsys, *words)
    assert run(*words, "--device", "cpu") == 0


def test_a_teacher_on_another_device_gives_the_same_cache(folder: Path, tmp_path: Path) -> None:
    for name, device in (("plain", "cpu"), ("moved", "cpu:0")):
        build(
            CacheConfig(), output=tmp_path / name, data=[str(folder / "faces.csv")], teacher=folder / "general.pt",
            taps=["map=stage2"], progress=False, hardware=Hardware(torch.device(device)),
        )  # fmt: skip
    plain, moved = (tmp_path / name for name in ("plain", "moved"))
    assert (plain / "header.json").read_text() == (moved / "header.json").read_text()
    assert (plain / "shard-00000.bin").read_bytes() == (moved / "shard-00000.bin").read_bytes()


def test_a_second_command_on_an_output_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from kdlib_faces._output import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        line = fails(capsys, *train(folder, output))
        assert f"the output {output} is in use by process {holder.pid} on " in line
        holder.kill()
    with locked(output):  # the lock ended with its process
        assert str(os.getpid()) in (output / ".lock").read_text()
    assert list(output.iterdir()) == []


def test_a_run_is_repeated_from_its_record(folder: Path, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    more = settings("training.steps=3", "training.ema_decay=0.5", "training.accumulate=2", "augment.mirror=0.25")
    assert run(*train(folder, first, "--seed", 7, *more)) == 0
    assert run("train", "--config", first / "run.toml", "--output", second, "--quiet") == 0
    assert (first / "run.toml").read_text() == (second / "run.toml").read_text()
    networks = [load_backbone(path / "student.safetensors").state_dict() for path in (first, second)]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    average = load_checkpoint(first / "checkpoints" / "step-000000003.pt")["ema"]
    assert average is not None
    for name, value in networks[0].items():  # the saved network is the running mean
        assert any(torch.equal(value, each) for key, each in average.items() if key.endswith(name)), name
    text = (first / "run.toml").read_text()
    changed = tmp_path / "changed.toml"
    for old, new, message in (
        ('seed = 7', 'sed = 7', "no setting named 'sed'; the nearest are 'seed'"),
        ("steps = 3", "step = 3", "no setting named 'training.step'; the nearest are 'training.steps'"),
        ('faces = "', 'faces = "0', "describes a run with other data: the fingerprint of faces was 0"),
    ):  # fmt: skip
        changed.write_text(text.replace(old, new, 1))
        assert message in fails(capsys, "train", "--config", changed, "--output", tmp_path / "other", "--quiet")
    changed.write_text(text.replace('torch = "', 'torch = "0', 1))
    assert run("train", "--config", changed, "--output", second) == 0
    assert "had other versions: torch 0" in capsys.readouterr().err


def test_float16_scales_the_loss_and_keep_counts_checkpoints(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = settings("training.steps=5", "training.keep=3", "training.checkpoint_seconds=1e-6", "training.amp=float16")
    assert run(*train(folder, output, *more)) == 0
    kept = sorted((output / "checkpoints").iterdir())
    assert [path.name for path in kept] == [f"step-{step:09d}.pt" for step in (3, 4, 5)]
    assert load_checkpoint(kept[-1])["scaler"]["scale"] >= 1


def test_settings_out_of_range_are_refused() -> None:
    for given, message in (
        ({"accumulate": 0}, "accumulate"), ({"clip_norm": 0.0}, "clip_norm"), ({"keep": 0}, "keep"),
        ({"ema_decay": 2.0}, "ema_decay"), ({"amp": "half"}, "amp"), ({"checkpoint_seconds": 0}, "checkpoint_seconds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**given)


def test_tensorboard_gets_every_step(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    written: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")

        def __enter__(self) -> "SummaryWriter":
            return self

        def __exit__(self, *error: object) -> None:
            written.append(("closed", 0))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = train(folder, tmp_path / "run", "--tensorboard", *settings("training.steps=2"))
    assert "pip install tensorboard" in fails(capsys, *words)
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert run(*words) == 0
    assert {("loss", 1), ("terms/identity", 2), ("speed/data_wait", 2)} < set(written)
    assert written[-1] == ("closed", 0)


@pytest.mark.parametrize(
    ("wait", "teachers", "settings", "advice"),
    [
        (
            0.4,
            0.9,
            TrainingConfig(),
            "limited by the loader, for which steps waited 40% of the time: raise --workers (3)",
        ),
        (
            0.0,
            0.6,
            TrainingConfig(),
            "limited by the teachers, 60% of a step: cache their outputs with kdlib-faces cache",
        ),
        (0.0, 0.1, TrainingConfig(), "limited by the student: --amp bfloat16 or --compile or more processes may help"),
        (0.0, 0.0, TrainingConfig(amp="bfloat16", compile=True), "limited by the student: more processes may help"),
    ],
)
def test_the_end_of_a_run_names_its_limit(wait: float, teachers: float, settings: TrainingConfig, advice: str) -> None:
    hook = SpeedAdvice.__new__(SpeedAdvice)
    hook.settings, hook.workers, hook.text = settings, 3, ""
    event = TrainEvent(5, 5, 0, 1.0, {}, {}, 0.1, 80.0, 1.0, step_seconds=0.2, data_wait=wait)
    assert f"limited by {hook._limit(event, teachers)}".startswith(advice)
