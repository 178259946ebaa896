"""Rendering of synthetic faces from trait vectors, ages and nuisance variables.

Coordinates are those of an aligned crop: x to the right and y down in [-1, 1], the eyes near y = -0.15. Every contour is a
signed distance that a sigmoid about one pixel wide converts to coverage, which avoids aliasing.
"""

import torch
from torch import Tensor

__all__ = ["IDENTITY_TRAITS", "NUISANCES", "draw_faces"]

IDENTITY_TRAITS = 128
NUISANCES = 40

_WAVES = 6
_MOLES = 4
_WRINKLES = 7


class _Columns:
    """Returns the columns of an (n, c) table one after another, shaped (n 1 1) to broadcast over pixels."""

    def __init__(self, table: Tensor) -> None:
        self._columns = iter(table.unbind(1))

    def __call__(self, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        # Traits are clipped to three standard deviations, which keeps every face plausible.
        return (offset + scale * next(self._columns).clamp(-3, 3))[:, None, None]

    def uniform(self) -> Tensor:
        """The next column as a number in (0, 1)."""
        share: Tensor = torch.special.ndtr(next(self._columns))
        return share[:, None, None]


def _hash_noise(seeds: Tensor, size: int, channel: int) -> Tensor:
    """White noise in [-1, 1), (n h w), by integer hashing of (seed, pixel, channel), so exact on every machine."""
    pixel = torch.arange(size * size).view(1, size, size)
    x = (pixel * 374_761_393 + seeds[:, None, None] * 668_265_263 + channel * 2_246_822_519) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return x.float() / 2.0**31 - 1.0


def _ellipse(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float, power: float = 2.0) -> Tensor:
    """Negative inside; near the contour approximately a distance in units of the crop."""
    radius = ((x / width).abs() ** power + (y / height).abs() ** power + 1e-9) ** (1.0 / power)
    return (radius - 1.0) * torch.minimum(torch.as_tensor(width), torch.as_tensor(height))


def _mix(canvas: Tensor, color: Tensor, cover: Tensor) -> Tensor:
    """Paint `color` (n 3 1 1 or n 3 h w) over `canvas` (n 3 h w) where `cover` (n h w) is one."""
    return canvas + (color - canvas) * cover[:, None]


def _shade(canvas: Tensor, amount: Tensor) -> Tensor:
    """Darken `canvas` (n 3 h w) by the fraction `amount` (n h w)."""
    return canvas * (1.0 - amount)[:, None]


def _rgb(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    return torch.stack([red, green, blue], dim=1)


def draw_faces(traits: Tensor, ages: Tensor, nuisances: Tensor, noise_seeds: Tensor, size: int) -> Tensor:
    """Render (n 3 h w) uint8, RGB.

    Standard normal traits (n, IDENTITY_TRAITS) describe the identities and nuisances (n, NUISANCES) the photographs; ages
    (n,) are years, and noise_seeds (n,) whole numbers.
    """
    t, v = _Columns(traits), _Columns(nuisances)
    age = ages[:, None, None]
    # `grown` rises from 0 at birth to 1 at about 20 years, `worn` from 0 at about 30 to 1 at 80 years.
    grown = (1.0 - torch.exp(-((age / 9.0) ** 1.4))).clamp(0, 1)
    worn = ((age - 28.0) / 52.0).clamp(0, 1.2)
    # Children differ less from one another.
    spread = 0.45 + 0.55 * grown
    # How the identity ages: weight, sagging, graying, balding, lines.
    gain, sag, thinning = t(0.5), t(0.35, 0.8), t(0.35, 0.7)
    gray_at, bald_at = t(9.0, 52.0), t(14.0, 58.0)
    lined = t(0.3, 0.9)
    pace = worn * (1.0 + 0.3 * t())

    pixel = 2.0 / size
    axis = (torch.arange(size) + 0.5) * pixel - 1.0
    grid_y, grid_x = axis[None, :, None].expand(1, size, size), axis[None, None, :].expand(1, size, size)

    def cover(distance: Tensor, soft: float = 0.6) -> Tensor:
        return torch.sigmoid(-distance / (soft * pixel))

    # Camera: residual in-plane rotation, scale and shift after alignment; yaw and pitch move near parts more.
    roll, scale = v(0.06), 1.0 + v(0.045)
    shift_x, shift_y = v(0.03), v(0.03)
    yaw, pitch = v(0.30), v(0.20)
    cx = ((grid_x - shift_x) * torch.cos(roll) + (grid_y - shift_y) * torch.sin(roll)) / scale
    cy = (-(grid_x - shift_x) * torch.sin(roll) + (grid_y - shift_y) * torch.cos(roll)) / scale
    squeeze = torch.cos(yaw)

    def at(depth: float, x: Tensor | float = 0.0, y: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Pixel coordinates relative to a point of the head at `depth` in front of its axis."""
        return (cx - torch.sin(yaw) * depth) / squeeze - x, cy - torch.sin(pitch) * depth - y

    # Colors.
    tone, warm = t(0.16), t(0.05)
    base = (0.66 + tone).clamp(0.22, 0.9)
    sallow = 0.05 * pace
    skin = _rgb(base + 0.10 + warm, base - 0.04 - sallow * 0.4, base - 0.14 - warm - sallow)
    dark, red = t(0.15, 0.24).clamp(0.04, 0.7), t(0.06)
    hair_rgb = _rgb(dark + 0.06 + red.abs(), dark, dark * 0.7)
    gray = torch.sigmoid((age - gray_at) / 5.0)
    hair = hair_rgb + (0.74 - hair_rgb) * gray[:, None]
    # Children's hair darkens with age.
    hair = hair + (1.0 - grown)[:, None] * (0.16 + 0.10 * t().tanh()[:, None])
    iris_hue = t.uniform()
    iris = _rgb(0.18 + 0.3 * (1 - iris_hue), 0.2 + 0.24 * iris_hue, 0.1 + 0.5 * iris_hue**2)

    # Background.
    b_red, b_green, b_blue = v(0.2, 0.5), v(0.2, 0.5), v(0.2, 0.5)
    slope = v(0.15) * grid_x + v(0.15) * grid_y
    canvas = _rgb(b_red + slope, b_green + slope, b_blue + slope).clamp(0, 1)

    # Head: width, length, jaw and chin. A child's head is short and round; weight and sagging widen the jaw with age.
    hx, hy = at(0.0, 0.0, 0.06)
    width = 0.64 + 0.055 * t() * spread + 0.05 * (1 - grown) + 0.03 * gain * worn
    length = 0.86 + 0.06 * t() * spread - 0.10 * (1 - grown)
    jaw = 0.22 * t() * spread - 0.18 * (1 - grown) + 0.22 * sag * pace + 0.12 * gain * worn
    chin = 0.06 * t() * spread * grown
    cheek = 0.07 * t() * spread + 0.05 * (1 - grown) - 0.04 * pace
    below = (hy / length).clamp(-1, 1.2)
    profile = 1.0 + jaw * below.clamp(min=0) * (1.1 - below.clamp(min=0)) * 1.2
    profile = profile + cheek * torch.exp(-(((below - 0.3) / 0.25) ** 2))
    taper = 1.0 - 0.30 * below.clamp(min=0) ** 2
    head = _ellipse(hx / (profile * taper).clamp(min=0.4), hy + chin * below.clamp(min=0), width, length, 2.3)

    # Hair behind the head, then ears, neck, skin.
    volume = (0.10 + 0.05 * t()).clamp(0.02, 0.3) * (1.0 - 0.5 * torch.sigmoid((age - bald_at) / 6.0))
    long_hair = torch.sigmoid(3.0 * t() + 2.0 * v())
    reach = length * 0.95 + volume + 0.2 * long_hair
    behind = _ellipse(hx, hy + 0.10 - 0.25 * long_hair, width + volume + 0.02, reach, 2.4)
    canvas = _mix(canvas, hair * 0.85, cover(behind) * ((hy < 0.35) | (long_hair > 0.5)).float())
    neck = _ellipse(hx, hy - 1.0, width * (0.55 + 0.12 * gain * worn), 0.5, 4.0)
    canvas = _mix(canvas, skin * 0.82, cover(neck))
    ear = 0.05 + 0.015 * t() + 0.02 * pace
    for side in (-1.0, 1.0):
        ex, ey = at(-0.15, side * width * 1.0, 0.02)
        canvas = _mix(canvas, skin * 0.9, cover(_ellipse(ex, ey, ear, ear * 2.3)))
    inside = cover(head)
    face = skin.expand(-1, -1, size, size)

    # Skin texture: a few waves per identity, weaker for children.
    texture = torch.zeros_like(hx)
    for _ in range(_WAVES):
        fx, fy, phase = t(5.0), t(5.0), t(3.0)
        texture = texture + torch.sin(fx * hx + fy * hy + phase)
    face = face * (1.0 + (0.020 + 0.022 * grown) * texture)[:, None]
    # Moles appear at a random age and stay; spots appear with age.
    for _ in range(_MOLES):
        mx, my, seen_from, depth = t(0.28), t(0.30, 0.12), t.uniform() * 28.0, t.uniform()
        mole = cover(_ellipse(hx - mx, hy - my, 0.030, 0.030)) * torch.sigmoid((age - seen_from) / 1.5) * depth
        face = _shade(face, 0.45 * mole)
    for _ in range(3):
        mx, my = t(0.36), t(0.36)
        spot = torch.exp(-(((hx - mx) ** 2 + (hy - my) ** 2) / 0.012)) * (pace - 0.35).clamp(0, 1)
        face = _shade(face, 0.22 * spot)
    # Blush of children.
    for side in (-1.0, 1.0):
        ex, ey = at(0.1, side * 0.34, 0.22)
        blush = torch.exp(-((ex**2 + ey**2) / 0.03))[:, None] * (1 - 0.7 * grown)[:, None]
        face = face + blush * torch.tensor([0.07, -0.02, -0.02])[None, :, None, None]

    # Lines: forehead, crow's feet, folds beside the mouth; position and depth depend on the identity.
    lines = torch.zeros_like(hx)
    for index in range(_WRINKLES):
        depth, bend, place = (lined + 0.4 * t()).clamp(0, 2), t(0.5), t(0.03)
        if index < 3:
            curve = hy + 0.36 + 0.085 * index + place + 0.12 * bend * hx**2
            reach = torch.exp(-((hx / 0.36) ** 4))
        else:
            side = -1.0 if index % 2 else 1.0
            top = -0.06 if index < 5 else 0.26
            fx, fy = at(0.15, side * (0.48 if index < 5 else 0.27), top)
            curve = (fx * side - 0.06 * bend * fy) if index >= 5 else (fy + 0.25 * bend * fx)
            reach = torch.exp(-(((fx**2 + fy**2) / 0.030) ** 2))
        lines = lines + torch.exp(-((curve / 0.016) ** 2)) * reach * depth
    face = face * (1.0 - 0.26 * lines * pace).clamp(min=0.2)[:, None]

    # Nose: a bright ridge, a shadow below it, nostrils. It grows with age.
    nose_length = 0.30 + 0.05 * t() * spread - 0.09 * (1 - grown) + 0.05 * pace
    nose_width = 0.105 + 0.025 * t() * spread + 0.02 * pace + 0.015 * (1 - grown)
    bridge = t(0.30) * spread
    nx, ny = at(0.30, 0.0, -0.12)
    along = (ny / nose_length).clamp(0, 1)
    ridge = torch.exp(-((nx / (0.035 + 0.25 * nose_width * along)) ** 2)) * ((ny > -0.05) & (ny < nose_length)).float()
    flank = torch.exp(-(((nx - 0.5 * nose_width * (0.6 + along)) / 0.04) ** 2))
    flank = flank * ((ny > 0) & (ny < nose_length)).float()
    face = face * (1.0 + (0.10 + 0.06 * bridge) * ridge - 0.12 * flank)[:, None]
    tx, ty = at(0.42, 0.0, -0.12)
    tip = _ellipse(tx, ty - nose_length, nose_width, 0.055)
    face = _shade(face, 0.16 * cover(tip, 1.5))
    for side in (-1.0, 1.0):
        nostril = _ellipse(tx - side * nose_width * 0.5, ty - nose_length - 0.02, 0.028, 0.017)
        face = _shade(face, 0.5 * cover(nostril))

    # Mouth: lips become thinner and corners sink with age; smile and opening vary per image.
    smile, gap = v(0.12), v(0.05, -0.03).clamp(min=0)
    mouth_y = 0.42 + 0.04 * t() * spread - 0.07 * (1 - grown)
    mouth_width = 0.25 + 0.04 * t() * spread - 0.05 * (1 - grown) + 0.08 * smile
    lip = (0.060 + 0.016 * t() * spread) * (1.0 - 0.45 * thinning.clamp(0, 1.6) * pace).clamp(min=0.3)
    bow = 0.02 * t()
    lip_red = 0.12 + 0.05 * t() - 0.06 * pace
    mx, my = at(0.26, 0.0, mouth_y)
    my = my + (0.8 * smile - 0.25 * sag * pace * 0.4) * mx.abs() ** 2 * 4.0 - bow * torch.cos(mx * 18.0) * (my < 0)
    lips = cover(_ellipse(mx, my, mouth_width, lip + gap))
    lips_rgb = face * _rgb(0.86 + lip_red, 0.68 - lip_red, 0.68 - lip_red)
    face = _mix(face, lips_rgb, lips)
    face = _shade(face, 0.6 * cover(_ellipse(mx, my, mouth_width * 0.96, 0.012 + gap)))

    # Eyes and brows: larger for children; lids droop with age.
    eye_x = 0.34 + 0.028 * t() * spread
    eye_w = 0.125 + 0.014 * t() * spread + 0.020 * (1 - grown)
    eye_h = (0.062 + 0.012 * t() * spread + 0.020 * (1 - grown)) * (1.0 + v(0.16)).clamp(0.3, 1.4)
    tilt, lid = 0.16 * t(), (0.25 * t(0.5, 0.7).clamp(min=0) * pace).clamp(0, 0.6)
    iris_r = 0.052 + 0.004 * t()
    look = v(0.02)
    brow_y, brow_arch, brow_tilt = 0.15 + 0.025 * t() * spread - 0.03 * pace, 0.9 * t(0.5, 0.8), 0.14 * t()
    brow_thick = (0.026 + 0.009 * t() + 0.004 * worn).clamp(0.008, 0.07) * (0.5 + 0.5 * grown)
    brow_rgb = hair * 0.7 + 0.05
    shade = 0.14 + 0.10 * pace * (1.0 + 0.5 * t())
    for side in (-1.0, 1.0):
        ex, ey = at(0.18, side * eye_x, -0.16)
        ey = ey + side * tilt * ex
        face = _shade(face, shade * torch.exp(-((ex / 0.17) ** 2 + ((ey - 0.03) / 0.11) ** 2)))
        bag = torch.exp(-(((ey - 0.115 - 1.1 * ex**2) / 0.020) ** 2)) * torch.exp(-((ex / 0.13) ** 4))
        face = _shade(face, 0.22 * bag * pace * lined.clamp(0, 2))
        opening = torch.maximum(_ellipse(ex, ey, eye_w, eye_h), -(ey + eye_h * (1.0 - 1.6 * lid)))
        seen = cover(opening)
        face = _mix(face, torch.full_like(skin, 0.92) - 0.10 * pace[:, None], seen)
        face = _mix(face, iris, seen * cover(_ellipse(ex - look, ey, iris_r, iris_r)))
        face = _mix(face, iris * 0.15, seen * cover(_ellipse(ex - look, ey, iris_r * 0.45, iris_r * 0.45)))
        face = _shade(face, 0.45 * torch.exp(-((opening / 0.016) ** 2)) * (ey < 0.01))
        bx, by = at(0.2, side * eye_x, -0.16)
        arch = by + brow_y - side * brow_tilt * bx + brow_arch * bx**2 * 2.0
        brow = cover(_ellipse(bx, arch, eye_w * 1.35, brow_thick)) * (0.35 + 0.65 * grown)
        face = _mix(face, brow_rgb, brow)
    canvas = _mix(canvas, face, inside)

    # Beard of some identities from about 20 years on, in some images.
    beard = torch.sigmoid(6.0 * (t() - 0.9)) * torch.sigmoid((age - 19.0) / 1.5) * torch.sigmoid(5.0 * v(1.0, 0.4))
    bearded = inside * torch.sigmoid((hy - 0.28 - 0.15 * torch.cos(hx * 3.0)) / 0.03) * (1 - lips)
    canvas = _mix(canvas, hair * 0.9, bearded * beard * 0.75)

    # Hair over the forehead: a receding hairline, a parting, a fringe that varies per image.
    recede = 0.22 * torch.sigmoid((age - bald_at) / 6.0) * (0.6 + 0.4 * thinning.clamp(0, 1.5))
    line = -0.50 + 0.04 * t() + v(0.04) - recede - 0.05 * (1 - grown)
    part, curl = t(0.18) + v(0.18), t(0.10)
    edge = hy - line - (0.14 + curl) * (hx - part) ** 2 - 0.02 * torch.sin(hx * 24.0 + 6.0 * part)
    crown = cover(_ellipse(hx, hy + 0.04, width + volume, length + volume * 0.6, 2.4))
    strands = 1.0 + 0.10 * torch.sin(hx * 40.0 * (1 + 0.2 * curl) + 9.0 * hy)
    fringe = crown * cover(edge, 1.0) * (1.0 - 0.6 * torch.sigmoid((age - bald_at - 12) / 5.0))
    canvas = _mix(canvas, hair * strands[:, None], fringe)

    # Glasses, a hand or a scarf.
    glasses = (v() > 1.15).float()
    frame = v(0.2, 0.15).clamp(0.0, 0.6)
    for side in (-1.0, 1.0):
        gx, gy = at(0.24, side * 0.34, -0.15)
        rim = _ellipse(gx, gy, 0.21, 0.16, 3.0).abs() - 0.016
        canvas = _mix(canvas, _rgb(frame, frame, frame), cover(rim) * glasses)
    hidden, ox, oy = (v() > 1.3).float(), v(0.5), v(0.3, 0.55)
    blob = _ellipse(grid_x - ox, grid_y - oy, 0.30 + v(0.05), 0.26 + v(0.05), 3.0)
    canvas = _mix(canvas, _rgb(v(0.2, 0.5), v(0.2, 0.4), v(0.2, 0.4)).clamp(0, 1), cover(blob) * hidden)

    # Light, exposure, color cast, blur, noise.
    light_x, light_y = v(0.26), v(0.16, -0.08)
    canvas = canvas * (1.0 + light_x * grid_x + light_y * grid_y)[:, None].clamp(0.3, 1.8)
    exposure, contrast, cast = 1.0 + v(0.13), 1.0 + v(0.14), v(0.03)
    canvas = ((canvas - 0.5) * contrast[:, None] + 0.5) * exposure[:, None] + _rgb(cast, 0 * cast, -cast)
    blur = (v.uniform() - 0.55).clamp(min=0)[:, None] * 2.0
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(canvas, (1, 1, 1, 1), mode="replicate"), 3, 1)
    canvas = canvas + (soft - canvas) * blur
    grain = 0.02 + 0.03 * v.uniform()
    noise = torch.stack([_hash_noise(noise_seeds, size, channel) for channel in range(3)], dim=1)
    canvas = canvas + grain[:, None] * noise
    return (canvas.clamp(0, 1) * 255.0).round().to(torch.uint8)
