"""How a score is read: which end is good, how dark it is drawn, and from where on something counts as recovered."""

from __future__ import annotations

import math

#: 0 is the perfect answer
LOWER = ("mse", "fft2d", "lpips")
#: Every picture has some PSNR or SSIM with every other: noise 5 to 10 dB, one grey 10 to 15. At 20 dB the eye sees what
#: it is; the others are of that order. Scores of texts, labels and crowds are 0 where nothing came back.
RECOGNISABLE = {"psnr": 20.0, "ssim": 0.5, "mse": 0.01, "fft2d": 0.01, "lpips": 0.4}
#: PSNR has no natural end; 40 dB is where the eye stops telling images apart.
_TOP = 40.0


def worth(metric: str, mean: float) -> float:
    """The mean, turned so that more is more recovered."""
    return -mean if metric in LOWER else mean


def recovered(metric: str, mean: float) -> bool:
    """Whether a mean says that something came back."""
    limit = RECOGNISABLE.get(metric)
    return mean > 0 if limit is None else worth(metric, mean) >= worth(metric, limit)


def strength(metric: str, mean: float) -> float:
    """How dark a cell is drawn: 0 nothing recovered, 1 everything."""
    if metric in ("mse", "fft2d"):
        return -10 * math.log10(max(mean, 1e-9)) / _TOP
    if metric == "psnr":
        return mean / _TOP
    return 1 - mean if metric in LOWER else mean


def ends(metric: str) -> tuple[str, str]:
    """What stands at the two ends of the colour scale."""
    if metric in ("mse", "fft2d"):
        return "1", "0.0001"
    return {"psnr": ("0", "40 dB"), "lpips": ("1", "0")}.get(metric, ("0", "100"))


def limit(metric: str) -> str:
    """`(20 dB or more)`: what `recovered` asks for, where that is more than not nothing."""
    value = RECOGNISABLE.get(metric)
    if value is None:
        return ""
    if metric in LOWER:
        return f" ({value:g} or less)"
    return f" ({value:g} dB or more)" if metric == "psnr" else f" ({100 * value:g} % or more)"
