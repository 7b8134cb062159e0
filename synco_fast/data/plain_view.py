"""The augmentation operator in plain torch: one view of one decoded image, bit for bit what the compiled one makes.

It runs where there is no compiler, many times slower, and is what the compiled operator is tested against.
Function by function it is kernels/include/synco/view.h, whose arithmetic is Pillow's.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from synco_fast.data.numbers import BLUR_PASSES, GREY, HUE

_RESAMPLE_BITS = 22


def make_view(image: Tensor, numbers: Tensor, size: int, values: Tensor) -> Tensor:
    """Crop, resize, change colours, blur, flip and normalise.

    Args:
        image: (H, W, 3) uint8.
        numbers: (VIEW_NUMBERS,) float32 on the CPU, a row of `view_numbers`.
        size: height and width of the view, pixels.
        values: (3, 256), a `value_table` in the output's dtype, on the image's device.

    Returns:
        (size, size, 3).
    """
    top, left, height, width, *resizing, flip, radius, weight, edge_weight = numbers[:12].int().tolist()
    resized_height, resized_width, window_top, window_left = resizing
    view = image[top : top + height, left : left + width].int()
    view = _resize(view.transpose(0, 1), resized_width, window_left, size).transpose(0, 1)  # along rows first
    view = _resize(view, resized_height, window_top, size)
    for kind, factor in numbers[12:].view(-1, 2).tolist():
        view = _change_colour(view, int(kind), factor)
    if radius >= 0:
        view = _blur(view.transpose(0, 1), radius, weight, edge_weight).transpose(0, 1)
        view = _blur(view, radius, weight, edge_weight)
    if flip:
        view = view.flip(1)
    return values[torch.arange(3, device=view.device), view.long()]


def _resize(view: Tensor, resized: int, begin: int, size: int) -> Tensor:
    """Antialiased triangle filter along the first dimension.

    From (n, m, 3) int32 to (size, m, 3), rows [begin, begin + size) of the `resized` that n become.
    """
    first, weights = _footprints(view.shape[0], resized, begin, size)
    taps = torch.arange(weights.shape[1])
    weights = weights.int().to(view.device)
    result = view.new_zeros(size, *view.shape[1:])
    for tap in taps.tolist():
        rows = (first + tap).clamp(max=view.shape[0] - 1).to(view.device)  # beyond the end the weight is 0
        result += weights[:, tap, None, None] * view[rows]
    return (result + (1 << (_RESAMPLE_BITS - 1))) >> _RESAMPLE_BITS


def _footprints(n: int, resized: int, begin: int, size: int) -> tuple[Tensor, Tensor]:
    """First source pixel of each output pixel, (size,), and its weights in 2^-22, (size, taps), int64 on the CPU."""
    scale = n / resized
    support = max(scale, 1.0)
    centre = (torch.arange(begin, begin + size, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).long().clamp(min=0)
    last = (centre + support + 0.5).long().clamp(max=n)
    taps = torch.arange(int((last - first).max()))
    distance = ((taps + first[:, None]).double() - centre[:, None] + 0.5) * (1.0 / support)
    weights = (1.0 - distance.abs()).clamp(min=0.0) * (taps < (last - first)[:, None])
    total = torch.zeros_like(centre)
    for tap in taps.tolist():  # one by one, as a sum in another order may differ in its last bit
        total += weights[:, tap]
    return first, (0.5 + weights / total[:, None] * (1 << _RESAMPLE_BITS)).long()


def _change_colour(view: Tensor, kind: int, factor: float) -> Tensor:
    if kind < 0:
        return view
    if kind == HUE:
        return _shift_hue(view, int(factor))
    grey = _luma(view)
    if kind == GREY:
        return grey.expand_as(view)
    count = grey.numel()
    degenerate = [torch.zeros_like(grey), (2 * grey.sum() + count) // (2 * count), grey][kind]
    blended = degenerate.float() + factor * (view - degenerate).float()
    return blended.clamp(0, 255).int()


def _luma(view: Tensor) -> Tensor:
    red, green, blue = view.split(1, dim=2)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _shift_hue(view: Tensor, shift: int) -> Tensor:
    """Through HSV of 8 bits each, by shift / 256 of the circle."""
    # Divided by tensors: on a GPU, torch multiplies by the reciprocal of a Python number.
    six, full = (torch.tensor(x, device=view.device) for x in (6.0, 255.0))
    red, green, blue = view.unbind(dim=2)
    value, smallest = view.amax(dim=2), view.amin(dim=2)
    spread = value - smallest
    red_leads, green_leads = red == value, green == value
    following = torch.where(red_leads, green, torch.where(green_leads, blue, red))
    preceding = torch.where(red_leads, blue, torch.where(green_leads, red, green))
    divisor = spread.clamp(min=1).float()
    from_following, from_preceding = (value - following).float() / divisor, (value - preceding).float() / divisor
    start = torch.where(red_leads, 0.0, torch.where(green_leads, 2.0, 4.0))
    sixths = torch.where(from_following == 1, start - 1 + from_preceding, start + 1 - from_following)
    turn = sixths / six + torch.where(sixths < 0, 1.0, 0.0)
    whole = (turn * 256).int()
    hue = (whole - (turn * 256 - whole.float() < turn).int() + shift) & 255
    saturation = (spread.float() / value.clamp(min=1).float() * 255).int()

    angles = [hue * 6 - third for third in (0, 510, 1020)]
    angles = [torch.where(angle < 0, angle + 1530, angle) for angle in angles]
    shares = [torch.minimum(angle - 255, 1275 - angle).clamp(0, 255) for angle in angles]
    faded = [value.float() * (1 - saturation.float() / full * (share.float() / full)) + 0.5 for share in shares]
    return torch.stack(faded, dim=2).int()


def _blur(view: Tensor, radius: int, weight: int, edge_weight: int) -> Tensor:
    """Three box filters along the first dimension, (n, m, 3) int32, whose ends go on beyond it."""
    n = len(view)
    for _ in range(BLUR_PASSES):
        line = view.permute(2, 1, 0).double()  # replication needs a float; these are small whole numbers
        line = pad(line, (radius + 1, radius + 1), mode="replicate").permute(2, 1, 0).long()
        inside = torch.stack([line[1 + k : 1 + k + n] for k in range(2 * radius + 1)]).sum(dim=0)
        beyond = line[:n] + line[-n:]
        view = ((inside * weight + beyond * edge_weight + (1 << 23)) >> 24).int()
    return view
