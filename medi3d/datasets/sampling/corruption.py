"""Corruptions for self-supervised pretraining, which the network restores: masked cubes, Models Genesis.

Images are `(C, D, H, W)` in [-1, 1]; every function returns a new tensor and draws from torch's global RNG.

Models Genesis: Zhou et al. 2019 (MICCAI, arXiv:1908.06912), with the rates and sizes of its reference code
(MrGiovanni/ModelsGenesis, `pytorch/utils.py` and `config.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medi3d.axes import Triple

BLACK, WHITE = -1.0, 1.0
BLOCKS_AT_MOST, NEXT_BLOCK = 5, 0.95
"""In- and out-painting: most blocks of an image, and the chance that another one follows."""


def mask_cubes(image: Tensor, side: int, share: float) -> tuple[Tensor, Tensor]:
    """Hide random cubes of a grid with a random offset.

    Args:
        image: `(C, D, H, W)`.
        side: side of a cube, in voxels.
        share: fraction of the cubes that are hidden, 0 to 1; at least one is hidden and one is left.

    Returns:
        The image, with each channel's mean in the hidden voxels, and the mask `(1, D, H, W)`, 1 where
        hidden.
    """
    shape = image.shape[1:]
    offsets = [int(torch.randint(side, ())) for _ in range(3)]
    cells = [-(-(size + offset) // side) for size, offset in zip(shape, offsets, strict=True)]
    count = int(np.prod(cells))
    hidden = torch.zeros(count)
    hidden[torch.randperm(count)[: min(max(1, round(share * count)), max(1, count - 1))]] = 1
    mask = hidden.view(cells)
    for axis, (size, offset) in enumerate(zip(shape, offsets, strict=True)):
        mask = mask.repeat_interleave(side, dim=axis).narrow(axis, offset, size)
    mask = mask[None]
    return torch.where(mask.bool(), image.mean(dim=(1, 2, 3), keepdim=True), image), mask


def shuffle_locally(image: Tensor) -> Tensor:
    """Shuffle voxels inside small blocks, up to a tenth of the image along each axis.

    The reference moves 10,000 single blocks, which meet each voxel of its 64×64×32 images about twice; here
    two tilings with blocks of random size do the same in two steps, for images of any size.
    """
    for _ in range(2):
        sides = [1 + int(torch.randint(max(1, size // 10), ())) for size in image.shape[1:]]
        image = _shuffle_blocks(image, sides)
    return image


def _shuffle_blocks(image: Tensor, sides: Sequence[int]) -> Tensor:
    """Shuffle the voxels of each block of a tiling; voxels of incomplete blocks at the far end stay."""
    depth, height, width = (size // side for size, side in zip(image.shape[1:], sides, strict=True))
    a, b, c = sides
    whole = image[:, : depth * a, : height * b, : width * c]
    blocks = whole.reshape(-1, depth, a, height, b, width, c).permute(0, 1, 3, 5, 2, 4, 6)
    flat = blocks.flatten(4).flatten(1, 3)  # (C, blocks, voxels of a block)
    order = torch.rand(flat.shape[1:]).argsort(dim=-1).expand_as(flat)
    shuffled = flat.gather(-1, order).view(blocks.shape).permute(0, 1, 4, 2, 5, 3, 6)
    result = image.clone()
    result[:, : depth * a, : height * b, : width * c] = shuffled.reshape(whole.shape)
    return result


def bend_intensities(image: Tensor) -> Tensor:
    """Map intensities by a random Bézier curve from black to white; in half of the draws it may fall."""
    points = np.array([[0.0, 0.0], *torch.rand(2, 2).double().tolist(), [1.0, 1.0]])
    t = np.linspace(0, 1, 1000)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    before, after = (weights @ points).T
    if float(torch.rand(())) >= 0.5:
        after = np.sort(after)
    unit = (image.double().numpy() - BLACK) / (WHITE - BLACK)
    bent = np.interp(unit, np.sort(before), after)
    return torch.from_numpy(bent * (WHITE - BLACK) + BLACK).to(image)


def paint_in(image: Tensor) -> Tensor:
    """Noise in up to five blocks inside the image, a sixth to a third of it along each axis."""
    image = image.clone()
    for _ in range(_blocks()):
        block = _block(image, [_between(size // 6, size // 3) for size in image.shape[1:]])
        image[block] = _noise(image[block])
    return image


def paint_out(image: Tensor) -> Tensor:
    """Noise everywhere except in up to five blocks, each about half of the image along each axis."""
    painted = _noise(image)
    for _ in range(max(1, _blocks())):
        sides = [size - _between(3 * size // 7, 4 * size // 7) for size in image.shape[1:]]
        block = _block(image, sides)
        painted[block] = image[block]
    return painted


def _blocks() -> int:
    count = 0
    while count < BLOCKS_AT_MOST and float(torch.rand(())) < NEXT_BLOCK:
        count += 1
    return count


def _between(low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included, and at least 1."""
    return max(1, low + int(torch.randint(high - low + 1, ())))


def _block(image: Tensor, sides: Sequence[int]) -> tuple[slice, ...]:
    """A position for a block, three voxels from the border where there is room."""
    size: Triple = (image.shape[1], image.shape[2], image.shape[3])
    rooms = [extent - side for extent, side in zip(size, sides, strict=True)]
    starts = [_start(room) for room in rooms]
    return (slice(None), *(slice(s, s + side) for s, side in zip(starts, sides, strict=True)))


def _start(room: int) -> int:
    margin = 3 if room > 6 else 0
    return margin + int(torch.randint(room - 2 * margin + 1, ()))


def _noise(like: Tensor) -> Tensor:
    return torch.rand(like.shape) * (WHITE - BLACK) + BLACK
