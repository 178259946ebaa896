"""Trained networks as safetensors files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kdlib.compression import shrink
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MobileFaceNet, load_backbone, save_backbone
from kdlib_faces.export import save_student
from kdlib_faces.recipes.liaad import LIAADConfig, build
from kdlib_faces.teachers import AgeInvariantNet, AttentiveAgeNet, load_teacher, save_teacher


def student() -> MobileFaceNet:
    return MobileFaceNet(embedding_dim=8, width=0.25, input_size=32).eval()


def header(path: Path) -> dict[str, object]:
    with safe_open(path, framework="np") as file:
        content: dict[str, object] = json.loads(file.metadata()["kdlib_faces"])
    return content


def test_the_header_describes_the_student(tmp_path: Path) -> None:
    network = student()
    network.input_spec = network.input_spec.changed(color="bgr")
    path = save_student(network, tmp_path / "student.safetensors", training={"recipe": "liaad", "steps": 7})
    found = header(path)
    assert found["backbone"] == "mobilefacenet"
    assert found["embedding_dim"] == 8
    assert found["training"] == {"recipe": "liaad", "steps": 7}
    assert load_backbone(path).input_spec == network.input_spec
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_backbone(path)(images), network(images))


def test_the_student_of_a_distiller_is_saved_and_its_state_dict_is_read(tmp_path: Path) -> None:
    distiller = build(LIAADConfig(num_identities=4, embedding_dim=16, width=0.25, input_size=32)).eval()
    images = torch.rand(2, 3, 32, 32)
    wanted = distiller.student.model.eval()(images)
    torch.save(distiller.state_dict(), tmp_path / "bare.pt")
    for path in (save_student(distiller, tmp_path / "student.safetensors"), tmp_path / "bare.pt"):
        assert torch.equal(load_backbone(path)(images), wanted)


def test_the_state_dict_of_a_narrow_student_is_read_or_refused_with_what_to_do(tmp_path: Path) -> None:
    images = torch.rand(24, 3, 32, 32)
    narrow = shrink(student(), [images], keep=0.5).eval()
    distiller = build(LIAADConfig(num_identities=4, input_size=32), student=narrow).eval()
    wanted = distiller.student.model.eval()(images)
    saved = save_student(distiller, tmp_path / "student.safetensors")
    assert torch.equal(load_backbone(saved)(images), wanted)
    torch.save(distiller.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(InputError, match="save_student"):
        load_backbone(tmp_path / "bare.pt")


@pytest.mark.parametrize("kind", [AgeInvariantNet, AttentiveAgeNet])
def test_age_invariant_teachers_are_safetensors_files(kind: type, tmp_path: Path) -> None:
    teacher, images = kind(student()).eval(), torch.rand(2, 3, 32, 32)
    save_teacher(teacher, tmp_path / "teacher.safetensors", training={"recipe": "age_teacher"})
    again = load_teacher(tmp_path / "teacher.safetensors")
    assert type(again) is kind
    assert torch.equal(again(images), teacher(images))
    with safe_open(tmp_path / "teacher.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["kdlib_faces_teacher"])["training"] == {"recipe": "age_teacher"}


def test_other_suffixes_and_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path must end in \.safetensors, got .*student\.pt"):
        save_student(student(), tmp_path / "student.pt")
    with pytest.raises(TypeError, match="got Linear"):
        save_student(torch.nn.Linear(2, 2), tmp_path / "student.safetensors")  # type: ignore[arg-type]


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    save_backbone(student(), tmp_path / "student.safetensors")
    content = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(content.replace(b'\\"backbone\\"', b'\\"backbonE\\"', 1))
    with pytest.raises(InputError, match="must contain 'backbone'"):
        load_backbone(tmp_path / "bad.safetensors")
