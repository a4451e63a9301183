"""Where data come from, and what is refused there: arrays, files, scikit-learn, torchvision, callables, folders."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sample import fault, images, load, npz, splits, whole
from PIL import Image

from causal_compress.errors import DataError, UsageError
from causal_compress.inputs.data import load_data
from causal_compress.recipe import DataSection, NormalizeSection


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"x": np.zeros((9, 2)), "labels": np.zeros(9)}, "lacks arrays"),
        ({"x_train": np.zeros((9, 2)), "y_train": np.arange(9) % 2, "x_test": np.zeros((9, 2))}, "lacks arrays"),
        ({"x": np.zeros((9, 2)), "y": np.arange(8) % 2}, "9 and 8"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 + 1}, "labels are not 0..C-1"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 * 2}, "labels are not 0..C-1"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 * 2}, "name all of them in the array `classes`"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 3, "classes": np.array(["a", "b"])}, "at least 3 names"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 - 1, "classes": np.array(["a", "b"])}, "labels -1..0"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2, "classes": np.array("ab")}, "classes is no list of names"),
        ({"x": np.zeros((9, 2)), "y": np.full(9, 0.5)}, "not integer labels"),
        ({"x": np.zeros((9, 2)), "y": np.eye(9)}, "y.argmax(1)"),
        ({"x": np.zeros((9, 2)), "y": np.array(["a", "b", "c"] * 3)}, "not integer labels"),
        ({"x": np.zeros((9, 2)), "y": np.full(9, np.nan)}, "not integer labels"),
        ({"x": np.full((9, 2), np.nan), "y": np.arange(9) % 2}, "NaN or infinity"),
        ({"x": np.full((9, 4, 4), np.inf), "y": np.arange(9) % 2}, "NaN or infinity"),
        ({"x": np.zeros((9, 3, 32, 32)), "y": np.arange(9) % 2}, "x.transpose(0, 2, 3, 1)"),
        ({"x": np.full((9, 4, 4), 300), "y": np.arange(9) % 2}, "outside 0..255"),
        ({"x": np.array([["a"]] * 9), "y": np.arange(9) % 2}, "not numeric"),
        ({"x": np.zeros(9), "y": np.arange(9) % 2}, "no usable shape"),
        ({"x": np.zeros((9, 0)), "y": np.arange(9) % 2}, "no usable shape"),
        ({"x": np.zeros((9, 2)), "y": np.zeros(9)}, "fewer than 2 classes"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "fewer than 2 classes"),
        ({"x": np.zeros((3, 2)), "y": np.arange(3) % 2}, "too small to be split"),
        (
            {
                "x_train": np.zeros((9, 2)),
                "y_train": np.arange(9) % 2,
                "x_test": np.zeros((9, 3)),
                "y_test": np.arange(9) % 2,
            },
            "differ in shape",
        ),
        (
            {
                "x_train": np.zeros((9, 2)),
                "y_train": np.arange(9) % 2,
                "x_test": np.zeros((0, 2)),
                "y_test": np.zeros(0),
            },
            "too small to be split",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], wanted: str) -> None:
    assert wanted in fault(npz(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"normalize": NormalizeSection(mean=[0.5])}, "data.normalize.mean does not fit"),
        ({"normalize": NormalizeSection(std=[0.5] * 4)}, "data.normalize.std does not fit"),
        ({"channels": 1}, "another number of channels"),
        ({"test_share": 1.0}, "too small to be split"),
    ],
)
def test_sections_that_do_not_fit_the_images(tmp_path: Path, section: dict[str, Any], wanted: str) -> None:
    x, y = images()
    assert wanted in fault(npz(tmp_path, x=x, y=y), **section)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object), y=np.arange(2))
    np.save(tmp_path / "lone.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "cut.npz", x=np.zeros((50, 50)), y=np.zeros(50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:5000])
    assert "pickled objects, which are never loaded" in fault(f"npz:{tmp_path / 'objects.npz'}")
    for name in ("lone.npy", "text.npz", "empty.npz", "cut.npz"):
        assert "can't be read as .npz" in fault(f"npz:{tmp_path / name}")
    assert "does not exist" in fault(f"npz:{tmp_path / 'nowhere.npz'}")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (None, "no data was given"),
        ("cifar10", "put the kind before the path"),
        ("data.npz", "did you mean npz:data.npz?"),
        ("npy:data", "did you mean npz:..."),
        ("sklearn:digit", "did you mean 'digits'?"),
        ("sklearn:covtype", "nothing is downloaded"),
        ("torchvision:CIFAR11:root", "did you mean 'CIFAR10'?"),
        ("torchvision:CIFAR10", "add the folder that holds it"),
        ("nowhere.py:make", "does not exist"),
    ],
)
def test_sources_that_mean_nothing(source: str | None, wanted: str) -> None:
    with pytest.raises(UsageError, match=re.escape(wanted)):
        load_data(DataSection(source=source), seed=0)


def test_test_source_is_for_tables() -> None:
    assert "csv: and parquet:" in fault("sklearn:digits", UsageError, test_source="test.csv")


def test_missing_torchvision_data(tmp_path: Path) -> None:
    message = fault(f"torchvision:CIFAR10:{tmp_path}")
    assert "download=True" in message
    assert "nothing is downloaded here" in message


def idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_torchvision_data_on_disk(tmp_path: Path) -> None:
    x, y = images(50, shape=(28, 28), classes=10)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 50), ("t10k", 20)):
        idx(raw / f"{part}-images-idx3-ubyte", x[:n])
        idx(raw / f"{part}-labels-idx1-ubyte", y[:n])
    data = load(f"torchvision:MNIST:{tmp_path}")
    assert (data.input_shape, len(data.test), data.classes[3]) == ((1, 28, 28), 20, "3 - three")
    np.testing.assert_array_equal(data.test.show([5])[0, :, :, 0], x[5])


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("digits", (1, 8, 8), 10), ("wine", (13,), 3), ("breast_cancer", (30,), 2), ("iris", (4,), 3)],
)
def test_sklearn(name: str, shape: tuple[int, ...], classes: int) -> None:
    data = load(f"sklearn:{name}")
    assert (data.input_shape, len(data.classes)) == (shape, classes)
    if name == "digits":
        assert whole(data.train).max() == 1
        assert whole(data.train).min() == 0


def test_own_callable(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy as np, torch\n"
        "X, Y = np.arange(80.0).reshape(40, 2), torch.arange(40) % 2\n"
        "def table(): return {'x': X, 'y': Y}\n"
        "def four(): return X, Y, X[:9], Y[:9]\n"
        "def nothing(): return 3\n"
        "def broken(): raise RuntimeError('no disk')\n"
    )
    assert load(f"{tmp_path / 'own.py'}:table").input_shape == (2,)
    assert len(load(f"{tmp_path / 'own.py'}:four").test) == 9
    assert "returned no data" in fault(f"{tmp_path / 'own.py'}:nothing")
    assert "RuntimeError: no disk" in fault(f"{tmp_path / 'own.py'}:broken", UsageError)


def folder_of_images(root: Path, parts: tuple[str, ...], size: tuple[int, int] = (10, 8), n: int = 6) -> str:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for index in range(n):
                image = Image.new("RGB", size, (label * 200, index, len(part)))
                image.save(root / part / name / f"{index}.png")
    return f"imagefolder:{root}"


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), (".",)])
def test_image_folder(tmp_path: Path, parts: tuple[str, ...]) -> None:
    data = load(folder_of_images(tmp_path, parts), image_size=8)
    assert (data.classes, data.input_shape) == (("cat", "dog"), (3, 8, 8))
    assert len(data.test) == (12 if len(parts) == 2 else 2)
    for split in splits(data):
        inputs, labels = next(split.batches(100))
        torch.testing.assert_close(inputs[:, 0, 0, 0], labels.float() * 200 / 255)


def test_image_folder_without_a_size_keeps_the_images_own(tmp_path: Path) -> None:
    assert load(folder_of_images(tmp_path, (".",)), channels=1).input_shape == (1, 8, 10)


def test_hidden_files_and_folders_hold_no_images(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / ".data", (".",))
    plain = load(source)
    cats = tmp_path / ".data" / "cat"
    (cats / "._0.png").write_bytes(b"\0\5\x16\7")  # what a Mac's zip adds
    (cats / "more" / ".ipynb_checkpoints").mkdir(parents=True)
    (cats / "more" / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes((cats / "0.png").read_bytes())
    assert load(source).fingerprint == plain.fingerprint
    for image in cats.glob("[0-9].png"):
        image.unlink()
    assert "has no images" in fault(source)


def test_faults_of_image_folders(tmp_path: Path) -> None:
    assert "does not exist" in fault(f"imagefolder:{tmp_path / 'nowhere'}")
    assert "no class folders" in fault(f"imagefolder:{tmp_path}")
    source = folder_of_images(tmp_path, ("train", "test"))
    (tmp_path / "test" / "eel").mkdir()
    assert "classes that train/ lacks" in fault(source)
    (tmp_path / "test" / "eel").rmdir()
    (tmp_path / "train" / "eel").mkdir()
    assert "has no images" in fault(source)
    (tmp_path / "train" / "eel").rmdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "test" / "dog" / "0.png")
    with pytest.raises(DataError, match=r"set data\.image_size"):
        whole(load(source).test)
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png can't be decoded"):
        whole(load(source, image_size=8).test)


def first_image(root: Path, content: bytes, name: str = "0.png") -> str:
    """A folder of images of which the first one has other bytes."""
    source = folder_of_images(root, (".",))
    (root / "cat" / "0.png").unlink()
    (root / "cat" / name).write_bytes(content)
    return source


def png(width: int, height: int, header: bool = True) -> bytes:
    """The head of a PNG file, whose pixels are left out."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)[: None if header else 8]
    chunks = [(b"IHDR", fields), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("name", "content"),
    [("0.png", png(4, 4, header=False)), ("0.ppm", b"P6\nK55 3\n255\n"), ("0.png", png(20_000, 20_000))],
    ids=["cut", "no numbers", "huge"],
)
@pytest.mark.parametrize("image_size", [None, 8])
def test_a_broken_or_huge_image_is_named(tmp_path: Path, name: str, content: bytes, image_size: int | None) -> None:
    source = first_image(tmp_path, content, name)
    with pytest.raises(DataError, match=r"cat.0\.p.. can't be decoded"):
        [whole(split) for split in splits(load(source, image_size=image_size))]


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
@pytest.mark.parametrize("image_size", [None, 8])
def test_pixels_of_more_than_8_bits_are_refused_not_clipped(
    tmp_path: Path, dtype: Any, suffix: str, image_size: int | None
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(6):
            pixels = np.arange(64, dtype=dtype).reshape(8, 8) * dtype(3)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.{suffix}")
    with pytest.raises(DataError, match=r"16-bit or float image(.|\n)*npz:"):
        whole(load(f"imagefolder:{tmp_path}", channels=1, image_size=image_size).train)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pixels_of_8_bits_are_read_in_every_mode(tmp_path: Path, mode: str) -> None:
    source = folder_of_images(tmp_path, (".",))
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.convert(mode).save(path.with_suffix(".tif"))
        path.unlink()
    assert load(source).input_shape == (3, 8, 10)


@pytest.mark.parametrize("parts", [("Train", "Test"), ("TRAIN", "Val")])
def test_the_case_of_the_parts_does_not_matter(tmp_path: Path, parts: tuple[str, str]) -> None:
    data = load(folder_of_images(tmp_path, parts))
    assert data.classes == ("cat", "dog")
    assert len(data.test) == 12


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path, (".",))
    (tmp_path / "dog").rename(tmp_path / "train")
    assert load(source).classes == ("cat", "train")


def test_images_beside_a_training_part_are_not_left_out_silently(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path, ("train",))
    (tmp_path / "notes").mkdir()
    assert load(source).classes == ("cat", "dog")
    (tmp_path / "train" / "cat").rename(tmp_path / "cat")
    message = fault(source)
    assert "images beside it in cat" in message
    assert "give that folder another name" in message


def test_labels_that_only_decoding_shows_name_a_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoded:
        def __init__(self, root: str, train: bool) -> None: ...

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            raise Image.DecompressionBombError("far too large")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Decoded)
    assert "CIFAR10[0] can't be decoded" in fault(f"torchvision:CIFAR10:{tmp_path}")


@pytest.mark.parametrize("listed", [True, False])
def test_images_that_torchvision_decodes_have_a_fingerprint(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(40):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index:02}.png")

    class Decoded:
        def __init__(self, root: str, train: bool) -> None:
            self.root, self.train = root, train
            self.files = sorted(Path(root).glob("*.png"))[:30] if train else sorted(Path(root).glob("*.png"))[30:]
            self.labels = [index % 2 for index in range(len(self.files))]
            if listed:
                self._image_files = self.files

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(self.files[index]), self.labels[index]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Decoded)
    source = f"torchvision:CIFAR10:{tmp_path}"
    first = load(source).fingerprint
    assert load(source).fingerprint == first
    Image.new("RGB", (8, 8), (0, 99, 0)).save(tmp_path / "07.png")
    assert load(source).fingerprint != first


@pytest.mark.parametrize(("kind", "told"), [(np.uint8, True), (np.int64, True), (np.bool_, False), (np.float32, False)])
def test_whole_numbers_that_are_all_nearly_black_are_noticed(
    kind: type, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = (np.arange(40 * 16).reshape(40, 4, 4) % 2).astype(kind)
    np.savez(tmp_path / "masks.npz", x=x, y=np.arange(40) % 2)
    with caplog.at_level("WARNING"):
        load(f"npz:{tmp_path / 'masks.npz'}")
    assert ("255 counts as white" in caplog.text) == told
