"""Images made ready: pixels become inputs, splits stay apart, batches and augmentation follow their seeds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_sample import fault, images, load, npz, splits, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_compress.inputs.data import augmentation
from causal_compress.inputs.images import _random_warp
from causal_compress.recipe import AugmentSection, NormalizeSection


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


@pytest.mark.parametrize("mean", [[0.5, 0.5, 0.5], [0.5, 0.25, 0.5]])
def test_grey_images_are_repeated_to_the_wanted_channels(tmp_path: Path, mean: list[float]) -> None:
    x, y = images(shape=(6, 6))
    source = npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y)
    data = load(source, channels=3, normalize=NormalizeSection(mean=mean, std=[0.3, 0.3, 0.3]))
    assert data.input_shape == (3, 6, 6)
    wanted = (x[:, None] / 255.0 - np.array(mean)[:, None, None]) / 0.3
    np.testing.assert_allclose(whole(data.test).numpy(), wanted, atol=1e-5)
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


@pytest.mark.parametrize(("height", "width"), [(41, 41), (31, 61)])
def test_images_are_turned_and_zoomed_about_their_centre(tmp_path: Path, height: int, width: int) -> None:
    x = np.zeros((300, height, width), np.uint8)
    x[:, height // 2 - 7 : height // 2 - 4, width // 2 + 5 : width // 2 + 8] = 255  # a dot to the upper right
    y = np.arange(300) % 3
    data = load(npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y), augment=AugmentSection(rotation=30, zoom=1.25))
    turned, _ = next(data.test.batches(300, shuffle_seed=1, augment=True))
    again, _ = next(data.test.batches(300, shuffle_seed=1, augment=True))
    assert torch.equal(turned, again)
    light = turned[:, 0] / turned.sum((1, 2, 3))[:, None, None]
    rightwards = (light.sum(1) * (torch.arange(width) - width // 2)).sum(1)
    upwards = (light.sum(2) * (height // 2 - torch.arange(height))).sum(1)
    angles = torch.rad2deg(torch.atan2(upwards, rightwards)) - 45
    sizes = torch.hypot(upwards, rightwards) / 72**0.5
    assert -31 < angles.min() < -27
    assert 27 < angles.max() < 31
    assert 0.78 < sizes.min() < 0.83
    assert 1.21 < sizes.max() < 1.27
    assert abs(angles.mean()) < 3
    assert abs(sizes.log().mean()) < 0.03


def test_images_are_turned_as_a_grid_of_affine_maps_turns_them() -> None:
    x = torch.rand(20, 2, 12, 17, generator=torch.Generator().manual_seed(0))
    turned = _random_warp(x, 40.0, 1.3, torch.Generator().manual_seed(1))
    turn, power = 2 * torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) - 1
    angle, size, none = torch.deg2rad(40 * turn), 1.3**power, torch.zeros(20)
    cos, sin = angle.cos() / size, angle.sin() / size
    maps = torch.stack([cos, -sin * 12 / 17, none, sin * 17 / 12, cos, none], 1).view(20, 2, 3)
    grid = F.affine_grid(maps, [20, 2, 12, 17], align_corners=False)
    torch.testing.assert_close(turned, F.grid_sample(x, grid, align_corners=False), atol=1e-4, rtol=0.0)


def test_augmentations_of_later_versions_count_where_they_are_used(tmp_path: Path) -> None:
    assert augmentation(AugmentSection()) == {"crop_padding": 0, "horizontal_flip": False}
    assert augmentation(AugmentSection(zoom=1.2)) == {"crop_padding": 0, "horizontal_flip": False, "zoom": 1.2}
    x, y = images()
    source = npz(tmp_path, x=x, y=y)
    assert load(source, augment=AugmentSection(rotation=5)).fingerprint != load(source).fingerprint


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


def test_class_names_in_the_file(tmp_path: Path) -> None:
    x, y = images()
    assert load(npz(tmp_path, x=x, y=y, classes=np.array(["cat", "dog", "eel"]))).classes == ("cat", "dog", "eel")


def test_a_class_without_inputs_keeps_its_place(tmp_path: Path) -> None:
    x, y = images()
    source = npz(tmp_path, x=x, y=np.where(y == 1, 3, y), classes=np.array(["ant", "bee", "cat", "dog", "eel"]))
    data = load(source)
    assert data.classes == ("ant", "bee", "cat", "dog", "eel")
    assert all(set(split.labels.tolist()) == {0, 2, 3} for split in splits(data))


def test_one_training_input_is_too_few(tmp_path: Path) -> None:
    x, y = images()
    assert "data.max_train leaves too few" in fault(npz(tmp_path, x=x, y=y), max_train=1)
