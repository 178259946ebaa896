"""A vision transformer teaches a convolutional network: its class token and its patch tokens."""

import torch
from torch import Tensor, nn

from kdlib import OUTPUT, AngularDistillLoss, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term

CLASSES, PATCH, WIDTH = 6, 4, 48


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels as tokens, after a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 1 + (24 // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def convolutional_network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A patch of stripes at a random place; the class is their direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    rows, columns = 6 + 12 * torch.rand(2, count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    y, x = y - rows, x - columns
    images = (1.2 * (x * angle.cos() + y * angle.sin())).sin() * (-(x**2 + y**2) / 40).exp()
    return 2 * images[:, None] + 0.2 * torch.randn(count, 1, 24, 24, generator=generator), labels


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def fit(distiller: Distiller, images: Tensor, labels: Tensor, steps: int) -> None:
    distiller.infer(images[:2], {"label": labels[:2]})  # creates the projections, which are trained too
    optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=3e-3)
    distiller.train()
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        output = distiller(images[batch], {"label": labels[batch]})
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in output.terms.items()))


def main() -> None:
    torch.manual_seed(0)
    data, new = make_images(1024, seed=0), make_images(512, seed=1)
    teacher, student = VisionTransformer(), convolutional_network()
    label = Term(nn.CrossEntropyLoss(), student="logits", target="label")
    fit(Distiller(StudentAdapter(teacher, {"logits": OUTPUT}), {}, Objective({"label": label})), *data, steps=60)
    print(f"accuracy of the teacher: {accuracy(teacher, *new):.3f}")

    # A tap may be a slice: the token 0 is the class token, the others are those of the 6 x 6 patches.
    vit = TeacherAdapter(teacher, {"class_token": "norm[:, 0]", "patches": "norm[:, 1:]"})
    cnn = StudentAdapter(student, {"pooled": "7", "map": "5", "logits": OUTPUT})
    terms = {
        "label": label,
        "class_token": Term(AngularDistillLoss(), student="pooled", teacher="class_token", project="auto"),
        "patches": Term(HintLoss(), student="map", teacher="patches", project="auto"),
    }
    before = accuracy(student, *new)
    fit(Distiller(cnn, {"vit": vit}, Objective(terms)), *data, steps=120)
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, *new):.3f}")


if __name__ == "__main__":
    main()
