"""MACs and parameters, counted by hand and by the tool."""

import pytest
import torch
from torch import nn

from causal_compress.errors import TraceError
from causal_compress.understand.cost import count_macs, count_params, evaluating, plain_attention


def test_macs_and_params_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # 8 * 8 places, 8 * 27 each
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),  # 4 * 4 places, 8 * 9 each
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    assert count_macs(model, torch.zeros(2, 3, 8, 8)) == 64 * 8 * 27 + 16 * 8 * 9 + 128 * 5
    assert count_params(model) == 216 + 16 + 80 + 645


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_counts_all_its_products(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    # projections in (3 * 8 * 8) and out (8 * 8) for each of 5 tokens; scores and mixing 5 * 5 * 8 each
    assert count_macs(Attention().eval(), torch.zeros(1, 5, 8)) == 5 * (192 + 64) + 2 * 5 * 5 * 8


def test_recurrent_layers_count_all_their_products():
    class Last(nn.Module):
        def __init__(self, recurrent):
            super().__init__()
            self.recurrent = recurrent

        def forward(self, x):
            return self.recurrent(x)[0][:, -1]

    x = torch.rand(2, 7, 5)
    enabled = torch.backends.mkldnn.enabled
    assert count_macs(Last(nn.LSTM(5, 8, batch_first=True)), x) == 7 * 4 * 8 * (5 + 8)
    assert count_macs(Last(nn.GRU(5, 8, batch_first=True)), x) == 7 * 3 * 8 * (5 + 8)
    assert torch.backends.mkldnn.enabled == enabled


def test_counting_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    mean = model[1].running_mean.clone()
    fast = torch.backends.mha.get_fastpath_enabled()
    count_macs(model, torch.randn(4, 1, 3, 3))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, mean)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    assert count_params(nn.Sequential(layer, layer)) == 20


def test_input_that_does_not_fit_is_refused():
    with pytest.raises(TraceError, match="one input"):
        count_macs(nn.Linear(4, 2), torch.zeros(1, 3))


def test_modes_are_restored_after_a_failure():
    model = nn.Dropout().train()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="x"), evaluating(model), plain_attention():
        raise ValueError("x")
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
