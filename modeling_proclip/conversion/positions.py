"""Position embeddings and patches for images of another size, each as the published code of its layout does it."""

from collections.abc import Callable

import torch
from torch.nn import functional as F


def resize_positions(
    positions: torch.Tensor, grid: int, *, leading: int, align_corners: bool = False, antialias: bool = False
) -> torch.Tensor:
    """Position embeddings `(leading + old_grid ** 2, width)`, patches row by row, for `grid` patches a side, by bicubic interpolation; the first `leading`
    belong to no patch. The published code has `align_corners` for OpenAI's layout and not for EVA's; timm, which SigLIP2's tower comes from, `antialias`.
    """
    front, patches = positions[:leading], positions[leading:]
    side = round(len(patches) ** 0.5)
    if side == grid:
        return positions
    patches = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", align_corners=align_corners, antialias=antialias)
    return torch.cat([front, patches[0].flatten(1).T.to(positions.dtype)])


def resize_patches(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """A patch embedding's kernel `(width, channels, old, old)` for patches of `patch_size` pixels, as the published code for EVA does it."""
    if kernel.shape[-1] == patch_size:
        return kernel
    size = (patch_size, patch_size)
    return F.interpolate(kernel.float(), size, mode="bicubic", align_corners=False).to(kernel.dtype)


def positions_rule(grid: int, leading: int, **how: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transform: positions of shape `(n, width)` or `(1, n, width)` to `(leading + grid ** 2, width)`."""
    return lambda stored: resize_positions(stored.reshape(stored.shape[-2:]), grid, leading=leading, **how)
