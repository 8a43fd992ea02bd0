"""How alike two pictures are: structural similarity, beside the PSNR of genflow.samplers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import double
from genflow.registry import api_export

SIDE, SIGMA = 11, 1.5  # of the window, in pixels


@api_export("ssim")
def ssim(a: Tensor, b: Tensor, *, low: float = -1.0, peak: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, IEEE TIP 13(4), eq. 13) of each picture, the mean over places and channels.

    In a Gaussian window of 11 x 11, sigma 1.5, where it lies wholly inside. a, b: B x C x H x W, of sides of 11 or more;
    low, peak: the least of their range and its width, -1 and 2 for [-1, 1]; intensities count from low. Returns B float32.
    Raises UserError for smaller pictures, and for two sizes.
    """
    if a.dim() != 4 or a.shape != b.shape:
        sizes = " and of ".join(" x ".join(map(str, each.shape)) for each in (a, b))
        raise UserError(f"ssim: pictures of {sizes}; give both as B x C x H x W of one size")
    if min(a.shape[-2:]) < SIDE:
        raise UserError(
            f"ssim: pictures of {a.shape[-2]} x {a.shape[-1]} are smaller than its window of {SIDE} x {SIDE}"
        )
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    like, a, b = a, double(a) - low, double(b) - low  # variances are differences of like numbers
    places = torch.arange(SIDE, dtype=a.dtype, device=a.device) - SIDE // 2
    window = (-(places**2) / (2 * SIGMA**2)).exp()
    window = window / window.sum()

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1)).unflatten(0, a.shape[:2])[:, :, 0]

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1).to(like.device, torch.float32)
