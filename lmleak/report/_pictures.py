"""Reference beside recovered picture, as PNG inside the page: it needs no file beside it and loads none."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lmleak.report._diff import Pair

LARGEST = 256  #: pixels a side in the page; larger pictures are scaled down


def pairs(folder: Path, line: Mapping[str, Any], most: int = 8) -> list[Pair]:
    """One pair for each reference picture of a unit, matched as the metrics do; nothing where its file is gone."""
    from lmleak.errors import RunError
    from lmleak.metrics._images import pairs as matched
    from lmleak.records import Reconstruction, Reference
    from lmleak.runs import pictures

    try:
        images = pictures.load(folder, line.get("images"))
    except RunError:
        return []
    confidence = tuple((line.get("reconstruction") or {}).get("confidence") or ())
    found = Reconstruction(images=images.get("reconstruction"), confidence=confidence)
    both = matched(found, Reference(images=images.get("reference")))
    return [Pair(_shown(x), Markup() if y is None else _shown(y), False) for x, y in both[:most]]


def _shown(image: Any) -> Markup:
    """[c, y, x] in [0, 1] -> an image element."""
    import numpy as np
    from PIL import Image

    pixels = (image * 255).round().astype(np.uint8)
    # Grey or RGB; of any other number of channels the first is shown.
    made = Image.fromarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else Image.fromarray(pixels[0])
    made.thumbnail((LARGEST, LARGEST))
    out = BytesIO()
    made.save(out, "PNG", optimize=True)
    return Markup('<img alt="" src="data:image/png;base64,{}">').format(base64.b64encode(out.getvalue()).decode())
