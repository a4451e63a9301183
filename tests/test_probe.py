"""Chunks of calibration inputs, and batch norm statistics taken on them."""

from __future__ import annotations

import pytest
import torch
from distill_sample import Rows
from torch import Tensor, nn

from causal_compress.inputs.data import Features, Split
from causal_compress.recipe import InterveneSection, PlanSection
from causal_compress.shrink.batch_norms import reestimate_batch_norms
from causal_compress.shrink.probe import CHUNK, Probe, draw_probe

COLUMNS = 3


def drawn(count: int) -> Probe:
    """A probe from rows that can be told apart."""
    split: Split = Rows(torch.arange(count * COLUMNS).reshape(count, COLUMNS).float(), torch.zeros(count))  # type: ignore[assignment]
    columns = tuple((column,) for column in range(COLUMNS))
    features = Features("table", ("a", "b", "c"), columns, torch.zeros(COLUMNS), torch.ones(COLUMNS))
    return draw_probe(split, features, PlanSection(), InterveneSection(), count, seed=0)


@pytest.mark.parametrize("count", [16, 17, 65, 100, 128, 129, 257, 300])
def test_no_chunk_is_much_smaller_than_the_others(count: int) -> None:
    probe = drawn(count)
    usual = min(CHUNK, count // 4)
    sizes = [len(x) for x in (*probe.heldout, *probe.surgery)]
    assert sum(sizes) == count
    assert set(sizes[:-1]) == {usual}
    assert usual / 2 <= sizes[-1] < 1.5 * usual


class Twice(nn.Module):
    """A batch norm that is called twice, on rows of different means."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(x + 1.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [65, 129, 257])
def test_statistics_can_be_taken_where_a_chunk_would_have_one_row(count: int) -> None:
    surgery = drawn(count).surgery
    norm = nn.BatchNorm1d(COLUMNS)
    assert reestimate_batch_norms(norm, surgery)
    torch.testing.assert_close(norm.running_mean, torch.cat(surgery).mean(0))


@pytest.mark.parametrize(("model", "shift"), [(nn.BatchNorm1d(COLUMNS), 0.0), (Twice(), 0.5)])
def test_every_input_has_the_same_weight_in_the_statistics(model: nn.Module, shift: float) -> None:
    x = torch.randn(100, COLUMNS, generator=torch.Generator().manual_seed(0)) + torch.arange(100).unsqueeze(1)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    norm.momentum = 0.3
    assert reestimate_batch_norms(model, x.split([64, 32, 4]))
    torch.testing.assert_close(norm.running_mean, x.mean(0) + shift)
    assert (norm.momentum, norm.training, len(norm._forward_pre_hooks)) == (0.3, False, 0)
