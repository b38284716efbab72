"""Pictures on the page: inside it, matched to their references, and never a reason for it to fail."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lmleak.report import _pictures


@pytest.fixture
def unit(tmp_path):
    (tmp_path / "images").mkdir()
    reference = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"reference": reference, "reconstruction": reference.flip(0)}, tmp_path / "images/c-0.safetensors")
    return tmp_path, {"images": "images/c-0.safetensors", "reconstruction": {"confidence": [0.9, 0.8]}}, reference


def pixels(markup):
    data = re.fullmatch(r'<img alt="" src="data:image/png;base64,([\w+/=]+)">', str(markup))[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_picture_stands_beside_its_own_reference(unit):
    folder, line, reference = unit
    found = _pictures.pairs(folder, line)
    assert len(found) == 2
    for pair, image in zip(found, reference, strict=True):
        expected = (image.permute(1, 2, 0).double() * 255).round().numpy().astype(np.uint8)
        assert np.array_equal(pixels(pair.reference), expected)
        assert np.array_equal(pixels(pair.recovered), expected)


def test_what_is_gone_or_elsewhere_is_not_shown(unit):
    folder, line, reference = unit
    assert _pictures.pairs(folder, line | {"images": "images/../../etc.safetensors"}) == []
    assert _pictures.pairs(folder, line | {"images": "images/none.safetensors"}) == []
    save_file({"reference": reference[:, :1].contiguous()}, folder / "images/c-0.safetensors")
    found = _pictures.pairs(folder, line)
    assert pixels(found[0].reference).shape == (8, 8)
    assert found[0].recovered == ""
