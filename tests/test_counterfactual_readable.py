"""What counterfactuals change is told in words and digits that show it."""

import pytest
import torch

from causal_compress.counterfactual.constraints import Domain
from causal_compress.counterfactual.readable import _in_digits, largest_changes
from causal_compress.inputs.data import Features


def test_a_change_is_told_in_digits_that_show_it():
    rules = {"low": 0.0, "high": 1.0, "direction": 0.0, "least": 0.01, "step": 0.0, "offset": 101325.0, "scale": 150.0}
    tensors = {name: torch.tensor([value]) for name, value in rules.items()}
    domain = Domain(**tensors, immutable=torch.tensor([False]), columns=((0,),))
    features = Features("table", ("pressure",), ((0,),), torch.zeros(1), torch.zeros(1), ((),))
    change = largest_changes(domain, features, torch.tensor([0.0]), torch.tensor([0.0101]), 1)[0]
    assert (change.before, change.after) == ("101325", "101327")


@pytest.mark.parametrize(
    ("value", "least", "wanted"),
    [
        (0.123456, 0.01, "0.1235"),
        (1.23456, 0.0001, "1.2346"),
        (1013250.7, 1500.0, "1013251"),
        (-101325.4, 1.5, "-101325"),
        (1.5e-7, 1e-9, "1.5e-07"),
        (0.0, 1.0, "0"),
        (12.5, 0.0, "12.5"),
    ],
)
def test_numbers_have_the_digits_of_their_column(value, least, wanted):
    assert _in_digits(value, least) == wanted
