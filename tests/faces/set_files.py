"""Small synthetic face sets in the published layouts: a few identities with a few images each, and all lists."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdlib_faces.backbones import MobileFaceNet, save_backbone
from kdlib_faces.commands import evaluate
from kdlib_faces.commands.evaluate import EvaluateConfig
from kdlib_faces.data.formats.bin import save_bin
from tests.faces.matlab_file import Grid, Record, Writer
from tests.faces.reader_files import put

SIDE = 32
FAST = EvaluateConfig(replicates=30, num_failures=2, batch_size=16, fars=(0.1, 0.001))
_BASES = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3))


def face(identity: int, shot: int) -> Image.Image:
    """A pattern that depends on the identity, with noise that depends on the shot."""
    noise = np.random.default_rng([identity, shot]).integers(-45, 46, (8, 8, 3))
    return Image.fromarray(np.clip(_BASES[identity] + noise, 0, 255).astype(np.uint8)).resize((SIDE, SIDE))


def put_face(path: Path, identity: int, shot: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    face(identity, shot).save(path, format="PNG")
    return path


def put_text(path: Path, lines: list[str]) -> Path:
    return put(path.parent, "\n".join(lines) + "\n", path.name)


def lfw(root: Path) -> str:
    """Two folds; the image of one pair is no image."""
    for identity in range(6):
        for shot in (1, 2, 3):
            put_face(root / f"lfw/P{identity}/P{identity}_{shot:04d}.jpg", identity, shot)
    put_text(root / "lfw/P5/P5_0009.raw", ["not an image"])
    lines = ["2\t3"]
    for fold in range(2):
        mine = range(3 * fold, 3 * fold + 3)
        lines += [f"P{identity}\t1\t{9 if identity == 5 else 2}" for identity in mine]
        lines += [f"P{identity}\t1\tP{(identity + 1) % 6}\t3" for identity in mine]
    return f"lfw={put_text(root / 'pairs.txt', lines)},images={root / 'lfw'}"


def two_lines(root: Path, name: str) -> str:
    """CALFW or CPLFW: two lines per pair, genuine pairs first."""
    lines = []
    for identity in range(4):
        for shot in (1, 2):
            put_face(root / f"{name}/W{identity}_{shot:04d}.jpg", identity + 6, shot)
        lines += [f"W{identity}_0001.jpg 1", f"W{identity}_0002.jpg 1"]
    for identity in range(4):
        lines += [f"W{identity}_0001.jpg 0", f"W{(identity + 1) % 4}_0002.jpg 0"]
    return f"{name}={put_text(root / f'{name}.txt', lines)},images={root / name},published=no"


def agedb(root: Path) -> str:
    cells = []
    for fold in range(2):
        left, right, labels = [], [], []
        for pair in range(4):
            identity, other = 4 * fold + pair % 4, 4 * fold + (pair + (pair > 1)) % 4
            for column, each, age in ((left, identity, 20), (right, other, 50)):
                name = f"{100 * pair + age}_Who{each}_{age}_m"
                put_face(root / f"agedb/{name}.jpg", each + 10, age)
                column.append(name)
            labels.append(1.0 if identity == other else -1.0)
        cells.append([Grid([[Record(pairs=Grid([left, right]), labels=np.array([labels]))]])])
    path = root / "04_FINAL_protocol_30_years.mat"
    path.write_bytes(Writer().file(splits=Grid(cells)))
    return f"agedb={path},images={root / 'agedb'},published=no"


def cfp(root: Path) -> str:
    folder = root / "cfp"
    for letter, what in (("F", "frontal"), ("P", "profile")):
        rows = []
        for identity in range(4):
            inside = f"Data/Images/{identity + 1:03d}/{what}/01.jpg"
            put_face(folder / inside, identity + 20, ord(letter))
            rows.append(f"{identity + 1} ../{inside}")
        put_text(folder / f"Protocol/Pair_list_{letter}.txt", rows)
    for fold in (1, 2):
        first = 2 * fold - 1
        put_text(folder / f"Protocol/Split/FP/{fold:02d}/same.txt", [f"{first},{first}", f"{first + 1},{first + 1}"])
        put_text(folder / f"Protocol/Split/FP/{fold:02d}/diff.txt", [f"{first},{first + 1}", f"{first + 1},{first}"])
    return f"cfp={folder},published=no"


def cacd(root: Path) -> str:
    for pair in (0, 1, 200, 201, 400, 401, 600, 601):
        for side in (0, 1):
            identity = pair % 40 + (side if pair % 400 >= 200 else 0)
            put_face(root / f"cacd/{pair:04d}_{side}.jpg", identity, side)
    return f"cacd_vs={root / 'cacd'}"


def fgnet(root: Path, name: str = "fgnet") -> str:
    """Three identities at four ages, with landmarks of 68 points for every image."""
    for subject in range(3):
        for at, age in enumerate((3, 12, 25, 48)):
            put_face(root / f"fgnet/{subject + 1:03d}A{age:02d}.JPG", subject + 30, at)
            corner = 8.0 + np.arange(68)[:, None] * np.array([0.2, 0.1])
            corner[[36, 39]], corner[[42, 45]] = (10.9, 14.8), (21.0, 14.7)
            corner[30], corner[48], corner[54] = (16.0, 20.5), (11.9, 26.4), (20.2, 26.3)
            rows = [f"{x:.3f} {y:.3f}" for x, y in corner]
            put_text(
                root / f"fgnet/points/{subject + 1:03d}a{age:02d}.pts",
                ["version: 1", "n_points: 68", "{", *rows, "}"],
            )
    return f"{name}={root / 'fgnet'},published=no"


def megaface(root: Path) -> str:
    for number in range(25):
        put_face(root / f"others/{number:03d}.png", number % 30, 50 + number)
    put_text(root / "others/list.json", ["{}"])
    return f"{fgnet(root, 'megaface_fgnet')},distractors={root / 'others'},far=0.02"


def ijbc(root: Path) -> str:
    """Eight templates of two media each: two galleries of two, and four probes, two of them mated in each gallery."""
    base = root / "ijbc"
    members, points = [], []
    for template in range(8):
        identity = template % 4
        for medium in (0, 1):
            image = f"{10 * template + medium}.jpg"
            put_face(base / f"loose_crop/{image}", identity + 40, 2 * template + medium)
            members.append(f"{image} {100 + template} {10 * template + medium}")
            points.append(f"{image} 10.9 14.8 21.0 14.7 16.0 20.5 11.9 26.4 20.2 26.3 0.9")
    put_text(base / "ijbc_face_tid_mid.txt", members)
    put_text(base / "ijbc_name_5pts_score.txt", points)
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8)]
    put_text(base / "ijbc_template_pair_label.txt", [f"{100 + a} {100 + b} {int(a % 4 == b % 4)}" for a, b in pairs])
    for name, templates in (("gallery_G1", (0, 1)), ("gallery_G2", (2, 3)), ("probe_mixed", (4, 5, 6, 7))):
        rows = ["TEMPLATE_ID,SUBJECT_ID", *(f"{100 + template},{template % 4}" for template in templates)]
        put_text(base / f"ijbc_1N_{name}.csv", rows)
    return f"ijbc={base},images={base / 'loose_crop'},published=no"


def dated(root: Path) -> Path:
    """A list with ages: five identities at four ages."""
    rows = ["path,identity,age"]
    for identity in range(5):
        for age in (4, 10, 24, 41):
            put_face(root / f"dated/{identity}_{age}.png", identity + 50, age)
            rows.append(f"dated/{identity}_{age}.png,identity {identity},{age + identity}")
    return put_text(root / "dated.csv", rows)


def grouped(root: Path) -> Path:
    """A list with age groups, as LAG has them."""
    rows = ["path,identity,age_group"]
    for identity in range(5):
        for shot, group in enumerate(("adult", "adult", "young")):
            put_face(root / f"grouped/{identity}_{shot}.png", identity + 55, shot)
            rows.append(f"grouped/{identity}_{shot}.png,identity {identity},{group}")
    return put_text(root / "grouped.csv", rows)


def bin_set(root: Path) -> str:
    images, same = [], []
    for pair in range(20):
        for side in (0, 1):
            stream = io.BytesIO()
            face(pair + (side if pair % 2 else 0), side).save(stream, format="PNG")
            images.append(stream.getvalue())
        same.append(pair % 2 == 0)
    save_bin(root / "small.bin", images, same)
    return f"bin={root / 'small.bin'}"


def network(path: Path, seed: int) -> Path:
    """A small network's weights."""
    torch.manual_seed(seed)
    save_backbone(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32).eval(), path)
    return path


def every_protocol(root: Path) -> list[str]:
    """The `--protocol` of each set, all files written below `root`."""
    ages, groups = dated(root), grouped(root)
    return [
        lfw(root), bin_set(root), agedb(root), two_lines(root, "calfw"), two_lines(root, "cplfw"), cfp(root), cacd(root),
        fgnet(root), megaface(root), ijbc(root), f"age_gap={ages}", f"age_errors={ages}", f"longitudinal={ages}",
        f"age_group={groups}", f"between_groups={groups}", f"leave_one_out={groups}",
    ]  # fmt: skip


def run_evaluate(config: EvaluateConfig, *, output: Path, **options: Any) -> Any:
    """Run the `evaluate` command and read its report.json."""
    evaluate.run(config, output=output, **options)
    return json.loads((output / "report.json").read_text(encoding="utf-8"))
