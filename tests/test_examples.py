"""Inputs on which teacher and student part, as people see them."""

from __future__ import annotations

import pandas as pd
import torch
from data_sample import load
from torch import nn

from causal_compress.explain.examples import find_disagreements


class Always(nn.Module):
    """Gives every input the same class."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(2)[self.answer].expand(len(x), 2)


def test_rows_of_a_table_show_names_of_categories_and_whole_numbers(tmp_path):
    n = 60
    table = {
        "bytes": [1234567 + row for row in range(n)],
        "share": [(row + 1) / 8 for row in range(n)],
        "proto": [["tcp", "udp", "icmp"][row % 3] for row in range(n)],
        "host": [f"host{row}" for row in range(n)],  # one row each: training has never seen those of validation
        "y": [row % 2 for row in range(n)],
    }
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    data = load(f"csv:{tmp_path / 't.csv'}", target="y")
    found = find_disagreements(Always(0), Always(1), data, most=100)
    rows = {
        f"bytes = {1234567 + row}, share = {(row + 1) / 8}, proto = {table['proto'][row]}, host = unknown".replace(
            ".0,", ","
        )
        for row in range(n)
    }
    assert len(found.disagreements) == found.disagreed == found.inputs > 2
    assert {one.row for one in found.disagreements} <= rows
