"""Sources of pictures: what they return, and which file an error names."""

from __future__ import annotations

import gzip
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lmleak import load_batches, load_model
from lmleak.data import photos
from lmleak.errors import DataError


@pytest.fixture(scope="module")
def rgb():
    return load_model("mlp", config={"image_size": 8, "hidden": [4]}, num_labels=3, device="cpu")


@pytest.fixture(scope="module")
def grey():
    return load_model("mlp", config={"image_size": 8, "channels": 1, "hidden": [4]}, num_labels=3, device="cpu")


def picture(path, size=(8, 8), seed=0, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_class_folders_are_labels_and_pixels_come_back(rgb, tmp_path):
    first = picture(tmp_path / "cat" / "0.png")
    picture(tmp_path / "dog" / "0.png", seed=1)
    batch = load_batches(rgb, "image_folder", path=str(tmp_path), batch_size=2, shuffle=False)[0]
    assert batch.reference.labels == (0, 1)
    expected = torch.from_numpy(first.astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(batch.reference.images[0], expected)
    torch.testing.assert_close(batch.inputs["pixel_values"][0], (expected - 0.5) / 0.5)


def test_zip_with_a_list(rgb, tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.png", "x/a.png")
        archive.writestr("labels.csv", "file,label,class\nx/a.png,2,dog\n")
    (batch,) = load_batches(rgb, "image_folder", path=str(path))
    assert batch.reference.labels == (2,)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.csv", "file,label\nx/b.png,2\n")
    with pytest.raises(DataError, match=r"labels.csv' names 'x/b.png'"):
        load_batches(rgb, "image_folder", path=str(path))


def test_errors_name_the_file(rgb, grey, tmp_path):
    load = lambda victim, **fields: load_batches(victim, "image_folder", path=str(tmp_path), **fields)  # noqa: E731
    picture(tmp_path / "a" / "big.png", (12, 9))
    with pytest.raises(DataError, match=r"big.png' is 12 x 9 pixels, the model reads 8 x 8"):
        load(rgb)
    assert load(rgb, fit="crop")[0].reference.images.shape == (1, 3, 8, 8)
    (tmp_path / "a" / "big.png").unlink()
    picture(tmp_path / "a" / "grey.png", mode="L")
    with pytest.raises(DataError, match=r"grey.png' has 1 channel, the model reads 3"):
        load(rgb)
    assert load(rgb, convert=True)[0].reference.images.shape == (1, 3, 8, 8)
    assert load(grey)[0].reference.images.shape == (1, 1, 8, 8)
    data = (tmp_path / "a" / "grey.png").read_bytes()
    (tmp_path / "a" / "grey.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"grey.png' is not an image that can be read"):
        load(grey)
    for name in "bcd":
        picture(tmp_path / name / "x.png")
    with pytest.raises(DataError, match=r"d/x.png' has label 3, outside 0..2"):
        load(rgb)


def idx(path, values, code=8):
    head = bytes((0, 0, code, values.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def test_idx(grey, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    path = tmp_path / "t-images-idx3-ubyte.gz"
    idx(path, images)
    idx(tmp_path / "t-labels-idx1-ubyte.gz", np.array([0, 1, 2, 0], dtype=np.uint8))
    batch = load_batches(grey, "idx", path=str(path), batch_size=4, shuffle=False)[0]
    assert batch.reference.labels == (0, 1, 2, 0)
    assert torch.equal(batch.reference.images[:, 0], torch.from_numpy(images / np.float32(255)))
    idx(path, images[:3])
    with pytest.raises(DataError, match=r"3 images.*4 labels"):
        load_batches(grey, "idx", path=str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t-images-idx3-ubyte.gz' cannot be read"):
        load_batches(grey, "idx", path=str(path))
    idx(path, images, code=13)
    with pytest.raises(DataError, match="no idx file of bytes"):
        load_batches(grey, "idx", path=str(path))


def test_photos_are_colourful_and_all_there(rgb):
    victim = load_model("mlp", config={"image_size": 8, "hidden": [4]}, device="cpu")
    batch = load_batches(victim, "photos", batch_size=8)[0]
    assert sorted(batch.reference.labels) == list(range(8))
    assert (batch.reference.images.flatten(1).std(1) > 0.01).all()
    other = load_batches(victim, "photos", batch_size=8, seed=0)[0]
    assert torch.equal(batch.reference.images, other.reference.images)
    with pytest.raises(DataError, match="label"):
        load_batches(rgb, "photos")


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_tiles_are_the_photos_pieces(tiles):
    whole, pieces = photos.load(photos.Config()), photos.load(photos.Config(tiles=tiles))
    assert len(pieces.names) == len(set(pieces.names)) == len(pieces.labels) == tiles**2 * len(whole.names)
    for place, label in enumerate(whole.labels):
        own = [pieces.read(i) for i in range(place, len(pieces.names), len(whole.names))]
        glued = np.vstack([np.hstack(own[row * tiles : (row + 1) * tiles]) for row in range(tiles)])
        rows, columns = (side // tiles * tiles for side in whole.read(place).shape[:2])
        np.testing.assert_array_equal(glued, whole.read(place)[:rows, :columns])
        assert set(pieces.labels[place :: len(whole.names)]) == {label}


def test_text_and_pictures_are_not_mixed_up(rgb, tiny_bert):
    with pytest.raises(DataError, match="'sample' is no data for image-classification"):
        load_batches(rgb, "sample")
    with pytest.raises(DataError, match="'photos' is no data for sequence-classification"):
        load_batches(tiny_bert, "photos")


def parquet(path, pictures, labels=(0, 1, 2), **more):
    table = datasets.Dataset.from_dict({"img": list(pictures), "label": list(labels), **more})
    table.cast_column("img", datasets.Image()).to_parquet(path)


def test_a_table_of_images(rgb, tmp_path):
    pixels = [picture(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    files = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    path = tmp_path / "train.parquet"
    parquet(path, files)
    batch = load_batches(rgb, "hub_images", path=str(path), batch_size=3, shuffle=False)[0]
    assert batch.reference.labels == (0, 1, 2)
    assert torch.equal(batch.reference.images[1], torch.from_numpy(pixels[1] / np.float32(255)).permute(2, 0, 1))
    assert len(load_batches(rgb, "hub_images", path=str(path), split="train[:2]")) == 2
    files[1]["bytes"] = files[1]["bytes"][:50]
    parquet(path, files)
    with pytest.raises(DataError, match=r"train.parquet\[train\] row 2' is not an image that can be read"):
        load_batches(rgb, "hub_images", path=str(path))
    parquet(path, files, labels=(0, 5, 2))
    with pytest.raises(DataError, match=r"train.parquet\[train\] row 2' has label 5, outside 0..2"):
        load_batches(rgb, "hub_images", path=str(path))
    parquet(path, [None, *files[1:]])
    with pytest.raises(DataError, match=r"row 1' has no image"):
        load_batches(rgb, "hub_images", path=str(path))
    datasets.Dataset.from_dict({"img": ["a"], "label": [0]}).to_parquet(path)
    with pytest.raises(DataError, match=r"data.image_column: which column .* is the image\? It has: img, label"):
        load_batches(rgb, "hub_images", path=str(path))


def test_a_hub_id_without_a_network_names_the_alternatives(rgb):
    with pytest.raises(DataError, match=r"someone/pictures.*kind: image_folder"):
        load_batches(rgb, "hub_images", id="someone/pictures")
    with pytest.raises(DataError, match="give either id or path"):
        load_batches(rgb, "hub_images")


def test_lists_and_zips_that_cannot_be_read_are_named(rgb, tmp_path):
    read = lambda path: load_batches(rgb, "image_folder", path=str(path))  # noqa: E731
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(DataError, match=r"broken.zip' is neither a folder nor a zip"):
        read(tmp_path / "broken.zip")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none' holds no image"):
        read(tmp_path / "none")
    picture(tmp_path / "list" / "a.png")
    for text, words in [
        ("name,label\na.png,1\n", r"labels.csv' has no column 'file'"),
        ("file,label\na.png,dog\n", r"labels.csv'.*'dog'"),
        ("file,label\na.png,-1\n", r"list/a.png' has label -1, outside 0..2"),
        ("file,label\n", r"list' holds no image"),
    ]:
        (tmp_path / "list" / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            read(tmp_path / "list")
    with pytest.raises(DataError, match=r"no file or folder '.*nowhere'"):
        read(tmp_path / "nowhere")


def test_transparency_is_dropped_and_16_bits_are_refused(rgb, tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    batch = load_batches(rgb, "image_folder", path=str(tmp_path))[0]
    assert torch.equal(batch.reference.images[0], torch.from_numpy(pixels[..., :3] / np.float32(255)).permute(2, 0, 1))
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"a/x.png' has more than 256 levels"):
        load_batches(rgb, "image_folder", path=str(tmp_path), convert=True)
