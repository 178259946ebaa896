"""A wide segmentation network teaches a narrow one; pixels that nobody has labeled are left out."""

import torch
from torch import Tensor, nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term

CLASSES, IGNORED = 4, 255


def network(width: int) -> nn.Sequential:
    """Logits `(b, c, h, w)` from images `(b, 3, h, w)`."""
    encoder = [
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*encoder, nn.Conv2d(width, CLASSES, 1), nn.Upsample(scale_factor=2, mode="bilinear"))


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with three colored rectangles, and the class of each pixel `(b, h, w)`; the border has no label."""
    generator = torch.Generator().manual_seed(seed)
    images = 1.5 * torch.randn(count, 3, 32, 32, generator=generator)
    classes = torch.zeros(count, 32, 32, dtype=torch.long)
    for image, pixels in zip(images, classes, strict=True):
        for kind in torch.randperm(3, generator=generator).tolist():
            top, left = torch.randint(20, (2,), generator=generator).tolist()
            pixels[top : top + 12, left : left + 12] = kind + 1
        for kind in range(3):
            image[kind][pixels == kind + 1] += 1.5
    classes[:, [0, -1]] = classes[:, :, [0, -1]] = IGNORED
    return images, classes


def pixel_accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = model(images).argmax(1) == classes
    return right[classes != IGNORED].float().mean().item()


def fit(distiller: Distiller, images: Tensor, classes: Tensor, steps: int) -> None:
    distiller.infer(images[:2], {"classes": classes[:2], "labeled": classes[:2] != IGNORED})
    optimizer = torch.optim.Adam(distiller.trainable_parameters(), lr=5e-3)
    distiller.train()
    for step in range(steps):
        batch = torch.randint(len(images), (16,))
        targets = {"classes": classes[batch], "labeled": classes[batch] != IGNORED}
        output = distiller(images[batch], targets)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in output.terms.items()))


def main() -> None:
    torch.manual_seed(0)
    images, classes = make_images(192, seed=0)
    new = make_images(64, seed=1)
    teacher, student = network(48), network(8)

    taps = {"map": "4", "logits": OUTPUT}
    labels = Term(nn.CrossEntropyLoss(ignore_index=IGNORED), student="logits", target="classes")
    fit(Distiller(StudentAdapter(teacher, taps), {}, Objective({"labels": labels})), images, classes, steps=80)
    print(f"pixel accuracy of the teacher: {pixel_accuracy(teacher, *new):.3f}")

    terms = {
        "labels": labels,
        "soft": Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits", mask="labeled"),
        "map": Term(HintLoss(), student="map", teacher="map", project="auto"),
    }
    before = pixel_accuracy(student, *new)
    wide = TeacherAdapter(teacher, taps)
    fit(Distiller(StudentAdapter(student, taps), {"wide": wide}, Objective(terms)), images, classes, steps=80)
    print(f"pixel accuracy of the student: {before:.3f} -> {pixel_accuracy(student, *new):.3f}")


if __name__ == "__main__":
    main()
