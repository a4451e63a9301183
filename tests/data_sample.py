"""Images and arrays of which no two rows are equal, and short ways to load, read and refuse them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_compress.errors import CausalCompressError, DataError
from causal_compress.inputs.data import Data, load_data
from causal_compress.recipe import DataSection


def images(n: int = 60, shape: tuple[int, ...] = (6, 6, 3), classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images of which no two are equal, so that rows can be told apart."""
    x = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    x.reshape(n, -1)[:, 0], x.reshape(n, -1)[:, 1] = np.arange(n) % 256, np.arange(n) // 256
    return x, np.arange(n) % classes


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
