from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from causal_compress.errors import CausalCompressError, DataError, UsageError
from causal_compress.inputs.data import Data, load_data
from causal_compress.recipe import AugmentSection, DataSection, NormalizeSection

SHARED = Path(os.environ.get("CAUSAL_COMPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def images(n: int = 60, shape: tuple[int, ...] = (6, 6, 3), classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images of which no two are equal, so that rows can be told apart."""
    x = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    x.reshape(n, -1)[:, 0], x.reshape(n, -1)[:, 1] = np.arange(n) % 256, np.arange(n) // 256
    return x, np.arange(n) % classes


def two_parts(x_test: np.ndarray, y_test: np.ndarray) -> dict[str, np.ndarray]:
    return {"x_train": np.zeros((9, 2)), "y_train": np.arange(9) % 2, "x_test": x_test, "y_test": y_test}


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "data.npz", **arrays)
    return f"npz:{folder / 'data.npz'}"


def load(source: str, seed: int = 0, **section: Any) -> Data:
    return load_data(DataSection(source=source, **section), seed=seed)


def splits(data: Data) -> tuple[Any, ...]:
    return data.train, data.calibration, data.validation, data.test


def whole(split: Any) -> torch.Tensor:
    return torch.cat([x for x, _ in split.batches(7)])


def fault(source: str, kind: type[CausalCompressError] = DataError, **section: Any) -> str:
    with pytest.raises(kind) as caught:
        load(source, **section)
    assert caught.value.remedy
    return str(caught.value)


def test_npz_images_become_normalised_nchw(tmp_path: Path) -> None:
    x, y = images()
    normalize = NormalizeSection(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    data = load(npz(tmp_path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9]), normalize=normalize)
    wanted = (x[:9] / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    got = whole(data.test)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert data.test.labels.dtype == torch.int64
    np.testing.assert_allclose(got.numpy(), wanted.transpose(0, 3, 1, 2), atol=1e-6)
    assert (data.kind, data.input_shape, data.classes) == ("image", (3, 6, 6), ("0", "1", "2"))
    assert data.example_input.shape == (2, 3, 6, 6)
    np.testing.assert_array_equal(data.test.show([0, 3]), x[[0, 3]])


def test_grey_images_are_repeated_to_the_wanted_channels(tmp_path: Path) -> None:
    x, y = images(shape=(6, 6))
    data = load(npz(tmp_path, x=x, y=y), channels=3)
    assert data.input_shape == (3, 6, 6)
    assert torch.equal(data.example_input[:, 0], data.example_input[:, 2])


def test_image_size_resizes_and_crops(tmp_path: Path) -> None:
    x, y = images(shape=(6, 12, 1))
    data = load(npz(tmp_path, x=np.full_like(x, 51), y=y), image_size=8)
    assert data.input_shape == (1, 8, 8)
    torch.testing.assert_close(data.example_input, torch.full((2, 1, 8, 8), 0.2))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
def test_whole_numbers_up_to_255_are_pixels_whatever_their_type(tmp_path: Path, dtype: Any) -> None:
    x, y = images()
    data = load(npz(tmp_path, x_train=x.astype(dtype), y_train=y, x_test=x.astype(dtype), y_test=y))
    np.testing.assert_allclose(whole(data.test).numpy(), x.transpose(0, 3, 1, 2) / 255.0, atol=1e-6)


def test_scaled_floats_are_taken_as_they_stand(tmp_path: Path) -> None:
    x, y = images()
    scaled = x.astype(np.float32) / 100 - 1
    data = load(npz(tmp_path, x_train=scaled, y_train=y, x_test=scaled, y_test=y))
    np.testing.assert_allclose(whole(data.test).numpy(), scaled.transpose(0, 3, 1, 2))
    assert data.test.show([0]).dtype == np.uint8


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(20, 400),
    held_out=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    seed=st.integers(0, 5),
    own_test=st.booleans(),
    max_train=st.none() | st.integers(2, 300),
)
def test_splits_are_disjoint_and_never_starve_training(
    n: int, held_out: tuple[int, int], seed: int, own_test: bool, max_train: int | None
) -> None:
    x, y = images(n, shape=(2, 2), classes=2 + seed % 3)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20]} if own_test else {"x": x, "y": y}
    with tempfile.TemporaryDirectory() as folder:
        source = npz(Path(folder), **arrays)
        data = load(source, seed, calibration=held_out[0], validation=held_out[1], max_train=max_train)
    parts = [set(map(bytes, split.show(range(len(split))))) for split in splits(data)]
    held_in = parts[:3] if own_test else parts
    assert sum(map(len, held_in)) == len(set.union(*held_in))
    assert all(parts)
    pool = n if own_test else n - len(parts[3])
    assert len(parts[1]) + len(parts[2]) <= pool // 2
    if sum(held_out) <= pool // 2:
        assert (len(parts[1]), len(parts[2])) == held_out
    assert len(parts[0]) <= (max_train or n)


def test_splits_and_their_beginnings_are_stratified(tmp_path: Path) -> None:
    x, _ = images(1000, shape=(2, 2))
    y = np.sort(np.r_[np.zeros(700), np.ones(200), np.full(100, 2)]).astype(int)  # stored class by class
    data = load(npz(tmp_path, x=x, y=y), calibration=200, validation=100)
    for split in splits(data):
        np.testing.assert_allclose(np.bincount(split.labels) / len(split), [0.7, 0.2, 0.1], atol=0.03)
    first = np.bincount(data.calibration.labels[:50], minlength=3)
    np.testing.assert_allclose(first / 50, [0.7, 0.2, 0.1], atol=0.1)


def test_same_seed_same_split_other_seed_other_split(tmp_path: Path) -> None:
    x, y = images(100)
    source = npz(tmp_path, x=x, y=y)
    one, again, other = load(source, 1), load(source, 1), load(source, 2)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(whole(one.train), whole(again.train))
    assert not np.array_equal(one.test.positions, other.test.positions)


def test_the_fingerprint_follows_contents_and_preprocessing_not_the_place(tmp_path: Path) -> None:
    x, y = images()
    (tmp_path / "a").mkdir()
    first, elsewhere = load(npz(tmp_path, x=x, y=y)), load(npz(tmp_path / "a", x=x, y=y))
    assert first.fingerprint == elsewhere.fingerprint
    assert load(npz(tmp_path, x=x, y=y), image_size=5).fingerprint != first.fingerprint
    changed = x.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert load(npz(tmp_path, x=changed, y=y)).fingerprint != first.fingerprint


def test_validation_from_the_test_split_leaves_it_disjoint(tmp_path: Path) -> None:
    x, y = images(240)
    arrays = {"x_train": x[:160], "y_train": y[:160], "x_test": x[160:], "y_test": y[160:]}
    data = load(npz(tmp_path, **arrays), calibration=40, validation=30, validation_from="test")
    assert [len(part) for part in splits(data)] == [120, 40, 30, 50]
    held = {row.tobytes() for row in x[160:]}
    shown = [{row.tobytes() for row in part.show(range(len(part)))} for part in splits(data)]
    assert shown[2] | shown[3] == held
    assert not shown[2] & shown[3]
    assert not (shown[0] | shown[1]) & held
    positions = [row.tobytes() for row in x[160:]]
    for split, rows in ((data.validation, data.validation.show(range(30))), (data.test, data.test.show(range(50)))):
        assert split.labels.tolist() == [y[160 + positions.index(row.tobytes())] for row in rows]
    usual = load(npz(tmp_path, **arrays), calibration=40, validation=30)
    assert usual.fingerprint != data.fingerprint


def test_validation_from_the_test_split_is_stratified_and_max_test_is_kept(tmp_path: Path) -> None:
    x, y = images(480, classes=4)
    y_test = np.sort(y[240:])  # as folders of images give them, class by class
    arrays = {"x_train": x[:240], "y_train": y[:240], "x_test": x[240:], "y_test": y_test}
    data = load(npz(tmp_path, **arrays), calibration=40, validation=80, validation_from="test", max_test=100)
    assert len(data.validation) == 80
    assert len(data.test) == 100
    for split in (data.validation, data.test):
        assert np.bincount(split.labels[:20], minlength=4).tolist() == [5, 5, 5, 5]
    assert not {row.tobytes() for row in data.validation.show(range(80))} & {
        row.tobytes() for row in data.test.show(range(100))
    }


def test_validation_from_a_test_split_that_is_not_there(tmp_path: Path) -> None:
    x, y = images(100)
    assert "test split of its own" in fault(npz(tmp_path, x=x, y=y), validation_from="test")


def test_max_train_and_max_test(tmp_path: Path) -> None:
    x, y = images(90)
    data = load(npz(tmp_path, x_train=x, y_train=y, x_test=x[:30], y_test=y[:30]), max_train=9, max_test=6)
    assert (len(data.train), len(data.test)) == (9, 6)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]


def test_batches(tmp_path: Path) -> None:
    x, y = images()
    data = load(npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y))
    sizes = [len(labels) for _, labels in data.test.batches(25)]
    assert sizes == [25, 25, 10]
    assert sum(len(labels) for _, labels in data.test.batches(25, limit=30)) == 30
    shuffled = torch.cat([labels for _, labels in data.test.batches(25, shuffle_seed=1)])
    again = torch.cat([labels for _, labels in data.test.batches(7, shuffle_seed=1)])
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, data.test.labels)
    assert sorted(shuffled.tolist()) == sorted(y.tolist())
    inputs, labels = data.test.take(torch.tensor([4, 2]))
    assert torch.equal(inputs, whole(data.test)[[4, 2]])
    assert labels.tolist() == [y[4], y[2]]


def test_augmentation_crops_and_flips_and_follows_the_seed(tmp_path: Path) -> None:
    x, y = images(40, shape=(5, 5, 3))
    source = npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y)
    data = load(source, augment=AugmentSection(crop_padding=2, horizontal_flip=True))

    def epoch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(data.test.batches(40, shuffle_seed=seed, augment=True))
        return batches[0]

    first, order = epoch(3)
    assert torch.equal(first, epoch(3)[0])
    assert not torch.equal(first, epoch(4)[0])
    plain = next(data.test.batches(40, shuffle_seed=3))
    assert torch.equal(plain[1], order)
    seen = set()
    for image, original in zip(first, plain[0], strict=True):
        padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
        windows = {
            (top, left, flip): padded[:, top : top + 5, left : left + 5].flip(-1 if flip else ())
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, image)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 15


def test_reading_a_split_keeps_no_float_copy(tmp_path: Path) -> None:
    x, y = images(64)
    data = load(npz(tmp_path, x=x, y=y))
    assert data.train.rows.store.values.dtype == np.uint8  # type: ignore[union-attr]
    assert data.train.rows is data.calibration.rows


def test_features_of_images(tmp_path: Path) -> None:
    x, y = images(80)
    data = load(npz(tmp_path, x=x, y=y), normalize=NormalizeSection(mean=[0.5] * 3, std=[0.25] * 3))
    torch.testing.assert_close(data.features.mean, whole(data.calibration).mean(0))
    assert (data.features.zero.expand(3, 6, 6) == -2).all()
    assert data.features.kind == "image"


def test_npz_table(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (200, 4))
    data = load(npz(tmp_path, x=x, y=np.arange(200) % 2))
    assert (data.kind, data.input_shape) == ("table", (4,))
    train = whole(data.train)
    torch.testing.assert_close(train.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(4))
    np.testing.assert_array_equal(data.test.show([0]), x[data.test.positions[[0]]])


def test_class_names_in_the_file(tmp_path: Path) -> None:
    x, y = images()
    assert load(npz(tmp_path, x=x, y=y, classes=np.array(["cat", "dog", "eel"]))).classes == ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"x": np.zeros((9, 2)), "labels": np.zeros(9)}, "lacks arrays"),
        ({"x_train": np.zeros((9, 2)), "y_train": np.arange(9) % 2, "x_test": np.zeros((9, 2))}, "lacks arrays"),
        ({"x": np.zeros((9, 2)), "y": np.arange(8) % 2}, "9 and 8"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 + 1}, "labels are not 0..C-1"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2 * 2}, "labels are not 0..C-1"),
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


def frame(n: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 10, n),
            "visits": rng.integers(0, 9, n),
            "town": rng.choice(["Rome", "Oslo", "Lima"], n),
            "name": [f"person {index}" for index in range(n)],
            "label": ["yes" if index % 3 else "no" for index in range(n)],
        }
    )


def csv(folder: Path, table: pd.DataFrame, name: str = "table.csv", **options: Any) -> str:
    table.to_csv(folder / name, index=False, **options)
    return f"csv:{folder / name}"


def test_csv_is_encoded(tmp_path: Path) -> None:
    table = frame()
    data = load(csv(tmp_path, table), target="label", drop=["name"])
    assert (data.kind, data.classes, data.input_shape) == ("table", ("no", "yes"), (5,))
    assert data.features.names == ("age", "visits", "town")
    assert data.features.columns == ((0,), (1,), (2, 3, 4))
    assert data.features.categories == ((), (), ("Lima", "Oslo", "Rome"))
    numbers = table.loc[data.train.positions, ["age", "visits"]].to_numpy()
    wanted = (table.loc[data.test.positions, ["age", "visits"]].to_numpy() - numbers.mean(0)) / numbers.std(0)
    np.testing.assert_allclose(whole(data.test)[:, :2].numpy(), wanted, atol=1e-5)
    towns = [data.features.categories[2][int(code)] for code in data.test.show(range(len(data.test)))[:, 2]]
    assert towns == table["town"].iloc[data.test.positions].tolist()
    assert (whole(data.test)[:, 2:].sum(1) == 1).all()
    raw_zero = data.features.zero[:2].numpy() * numbers.std(0) + numbers.mean(0)
    np.testing.assert_allclose(raw_zero, 0, atol=1e-5)
    torch.testing.assert_close(data.features.mean, whole(data.calibration).mean(0))


def test_the_encoding_is_fitted_on_the_training_rows_only(tmp_path: Path) -> None:
    table = frame()
    plain = load(csv(tmp_path, table), target="label", drop=["name"])
    table.loc[np.r_[plain.test.positions, plain.validation.positions, plain.calibration.positions], "age"] = 1e6
    changed = load(csv(tmp_path, table), target="label", drop=["name"])
    assert torch.equal(whole(plain.train), whole(changed.train))


def test_missing_values(tmp_path: Path) -> None:
    table = frame()
    table.loc[::4, "age"] = np.nan
    table.loc[::5, "town"] = None
    data = load(csv(tmp_path, table), target="label", drop=["name"])
    assert data.features.categories[2] == ("<missing>", "Lima", "Oslo", "Rome")
    inputs, raw = whole(data.train), data.train.show(range(len(data.train)))
    assert torch.isfinite(inputs).all()
    filled = inputs[torch.from_numpy(np.isnan(raw[:, 0])), 0]
    torch.testing.assert_close(filled, torch.from_numpy(np.full(len(filled), filled[0])))
    median = table["age"].iloc[data.train.positions].median()
    known = inputs[torch.from_numpy(~np.isnan(raw[:, 0])), 0]
    assert known.min() < filled[0] < known.max()
    scale = np.polyfit(raw[~np.isnan(raw[:, 0]), 0], known.numpy(), 1)
    np.testing.assert_allclose(np.polyval(scale, median), filled[0], atol=1e-4)


def test_question_marks_are_missing_values(tmp_path: Path) -> None:
    table = frame().astype({"age": object})
    table.loc[3, "age"] = "?"
    assert load(csv(tmp_path, table), target="label", drop=["name"]).features.names[0] == "age"


def test_a_second_file_is_the_test_split(tmp_path: Path) -> None:
    train, test = frame(), frame(30)
    test.loc[0, "town"] = "Atlantis"
    csv(tmp_path, test, "test.csv")
    data = load(csv(tmp_path, train), test_source=str(tmp_path / "test.csv"), target="label", drop=["name"])
    assert len(data.test) == 30
    assert whole(data.test)[0, 2:].sum() == 0
    assert data.test.show([0])[0, 2] == -1


def test_tables_without_a_header_are_known_by_number(tmp_path: Path) -> None:
    source = csv(tmp_path, frame(), header=False)
    data = load(source, header=False, target=4, drop=[3], categorical=[2, 1])
    assert data.features.names == ("column_0", "column_2", "column_1")
    message = fault(source, header=False, target=40)
    assert "a number from 0 to 4" in message


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame().to_parquet(tmp_path / "table.parquet")
    data = load(f"parquet:{tmp_path / 'table.parquet'}", target="label", drop=["name"])
    assert data.input_shape == (5,)
    assert data.fingerprint == load(csv(tmp_path, frame()), target="label", drop=["name"]).fingerprint


def test_groups_of_labels(tmp_path: Path) -> None:
    table = frame()
    table["label"] = np.array([1, 2, 3, 4])[np.arange(120) % 4]
    source = csv(tmp_path, table)
    data = load(source, target="label", drop=["name"], target_groups={"good": [1], "bad": "*"})
    assert data.classes == ("good", "bad")
    assert abs(data.train.labels.float().mean() - 0.75) < 0.05
    message = fault(source, target="label", drop=["name"], target_groups={"good": ["1", "2"], "bad": ["3"]})
    assert "labels that belong to no class" in message
    assert "no row belongs to the class 'good'" in fault(
        source, target="label", drop=["name"], target_groups={"good": ["one"], "bad": "*"}
    )


def test_normalisation_given_for_a_table(tmp_path: Path) -> None:
    table = frame()
    section = {"target": "label", "drop": ["name"]}
    data = load(csv(tmp_path, table), normalize=NormalizeSection(mean=[0, 0], std=[10, 1]), **section)
    np.testing.assert_allclose(whole(data.test)[:, 0], table["age"].iloc[data.test.positions] / 10, rtol=1e-5)
    assert "one per numeric column" in fault(csv(tmp_path, table), normalize=NormalizeSection(mean=[0]), **section)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, "data.target is not set"),
        ({"target": "lable"}, "did you mean 'label'?"),
        ({"target": "label", "drop": ["nmae"]}, "did you mean 'name'?"),
        ({"target": "label", "categorical": ["twon"]}, "did you mean 'town'?"),
        ({"target": "label", "categorical": ["town"]}, "the column 'name' is not numeric"),
        ({"target": 4}, "data.header: false"),
        ({"target": "label", "drop": ["age", "visits", "town", "name"]}, "no input columns"),
    ],
)
def test_bad_columns(tmp_path: Path, section: dict[str, Any], wanted: str) -> None:
    assert wanted in fault(csv(tmp_path, frame()), **section)


def test_bad_tables(tmp_path: Path) -> None:
    section = {"target": "label", "drop": ["name"]}
    assert "does not exist" in fault(f"csv:{tmp_path / 'nowhere.csv'}", **section)
    (tmp_path / "empty.csv").write_text("")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'empty.csv'}", **section)
    (tmp_path / "head.csv").write_text("a,label\n")
    assert "has no rows" in fault(f"csv:{tmp_path / 'head.csv'}", **section)
    (tmp_path / "ragged.csv").write_text("a,label\n1,2\n1,2,3,4\n")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'ragged.csv'}", **section)
    (tmp_path / "bytes.csv").write_bytes(b"a,label\n\xff\xfe\xe9,1\n")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'bytes.csv'}", **section)
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "can't be read as parquet" in fault(f"parquet:{tmp_path / 'text.parquet'}", **section)
    infinite = frame()
    infinite.loc[5, "age"] = np.inf
    assert "infinity" in fault(csv(tmp_path, infinite), **section)
    unlabelled = frame()
    unlabelled.loc[5, "label"] = None
    assert "1 rows have no label" in fault(csv(tmp_path, unlabelled), **section)
    one_class = frame().assign(label="yes")
    assert "fewer than 2 classes" in fault(csv(tmp_path, one_class), **section)
    strange = csv(tmp_path, frame().assign(label="maybe"), "strange.csv").removeprefix("csv:")
    assert "maybe" in fault(csv(tmp_path, frame()), test_source=strange, **section)
    narrow = csv(tmp_path, frame().drop(columns="age"), "narrow.csv").removeprefix("csv:")
    assert "without age" in fault(csv(tmp_path, frame()), test_source=narrow, **section)


def test_identifiers_are_not_one_hot_encoded(tmp_path: Path) -> None:
    assert "too many categories" in fault(csv(tmp_path, frame(3000)), target="label", calibration=10, validation=10)


@pytest.mark.real
def test_nsl_kdd() -> None:
    folder = SHARED / "data" / "nsl-kdd"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    data = load(
        f"csv:{folder / 'train.csv'}",
        test_source=str(folder / "test.csv"),
        header=False,
        target=41,
        drop=[42],
        target_groups={"normal": ["normal"], "attack": "*"},
    )
    assert (len(data.features.names), data.input_shape, len(data.test)) == (41, (118,), 22544)
    assert [len(split) for split in splits(data)][:3] == [21144, 2048, 2000]
    assert all(torch.isfinite(whole(split)).all() for split in (data.calibration, data.validation))
    assert int(data.test.labels.sum()) == 12833
