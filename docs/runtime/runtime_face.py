"""Two photographs to a score, without torch: `python runtime_face.py yunet.onnx student.onnx a.jpg b.jpg`."""

import sys

import numpy as np
import onnxruntime
from PIL import Image

TEMPLATE = np.array(
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)


def detect(net, photo):  # five points x + yj of the face of highest score, in pixels of the photograph
    side = net.get_inputs()[0].shape[2]
    canvas, scale = Image.new("RGB", (side, side)), side / max(photo.size)
    canvas.paste(photo.resize([max(1, round(scale * length)) for length in photo.size]))
    pixels = np.asarray(canvas, np.float32)[None, :, :, ::-1].transpose(0, 3, 1, 2)
    out = net.run([f"{kind}_{s}" for kind in ("cls", "obj", "kps") for s in (8, 16, 32)], {"input": pixels})
    scores = [(cls * obj).ravel() for cls, obj in zip(out[:3], out[3:6], strict=True)]
    best = max(range(3), key=lambda level: scores[level].max())
    row, column = divmod(int(scores[best].argmax()), side // (8 << best))
    points = out[6 + best].reshape(-1, 5, 2)[scores[best].argmax()] @ [1, 1j]
    return (points + column + row * 1j) * (8 << best) / scale


def embed(net, photo, points):  # similarity transform to the template, crop, embedding of the crop and its mirror image
    z, t = points - points.mean(), TEMPLATE - TEMPLATE.mean()
    a = np.vdot(z, z) / np.vdot(z, t)
    b = points.mean() - a * TEMPLATE.mean() + (0.5 + 0.5j) * (1 - a)
    crop = photo.transform((112, 112), 0, (a.real, -a.imag, b.real, a.imag, a.real, b.imag), 2)  # affine, bilinear
    x = (np.asarray(crop, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
    rows = net.run(None, {net.get_inputs()[0].name: np.concatenate([x, x[..., ::-1]])})[0].sum(axis=0)
    return rows / np.linalg.norm(rows)


detector, model = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in sys.argv[1:3])
photos = [Image.open(path).convert("RGB") for path in sys.argv[3:5]]
left, right = (embed(model, photo, detect(detector, photo)) for photo in photos)
print(f"{left @ right:.4f}")
