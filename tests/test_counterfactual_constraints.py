"""What counterfactuals may look like: projections never break a constraint, and the check sees every kind of break."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_compress.counterfactual.constraints import Domain, domain_of, project, straight_through, violations
from causal_compress.errors import UsageError
from causal_compress.inputs.data import load_data
from causal_compress.recipe import CounterfactualSection, DataSection

ROWS = 60


def domain(**changed):
    """A number in steps of 1 (encoded by (raw - 10) / 2), a free number, and a column of three categories."""
    width = 5
    values = {
        "low": torch.tensor([-2.0, -1.0, 0.0, 0.0, 0.0]),
        "high": torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]),
        "scale": torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        "offset": torch.tensor([10.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        "step": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        "least": torch.full((width,), 0.01),
        "direction": torch.zeros(width),
        "immutable": torch.zeros(width, dtype=torch.bool),
        "columns": ((0,), (1,), (2, 3, 4)),
        "groups": ((2, 3, 4),),
    }
    return Domain(**(values | changed))


ORIGINAL = torch.tensor([[0.5, 0.25, 0.0, 1.0, 0.0]])


def test_known_projection():
    proposed = torch.tensor([[0.9, 5.0, 0.2, 0.3, 0.9]])
    # raw 11.8 -> 12 -> encoded 1.0; 5 -> 1; the third category wins
    assert project(domain(), ORIGINAL, proposed).tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]


def test_immutable_and_monotone_columns():
    proposed = torch.tensor([[-1.0, -0.5, 0.9, 0.0, 0.0]])
    rises = domain(direction=torch.tensor([1.0, 0.0, 0, 0, 0]))
    assert project(rises, ORIGINAL, proposed).tolist() == [[0.5, -0.5, 1.0, 0.0, 0.0]]
    still = domain(immutable=torch.tensor([False, True, True, True, True]))
    assert project(still, ORIGINAL, proposed).tolist() == [[-1.0, 0.25, 0.0, 1.0, 0.0]]


def test_changes_too_small_to_count_are_taken_back():
    assert project(domain(), ORIGINAL, ORIGINAL + 0.005).tolist() == ORIGINAL.tolist()


@given(st.integers(0, 10_000), st.sampled_from([-1.0, 0.0, 1.0]), st.booleans())
def test_projected_proposals_break_nothing(seed, direction, still):
    generator = torch.Generator().manual_seed(seed)
    number, free = torch.randn(2, 30, generator=generator) * 3  # some lie outside the ranges already
    kind = torch.nn.functional.one_hot(torch.randint(0, 3, (30,), generator=generator), 3)
    x = torch.cat([number[:, None], free[:, None], kind], 1)
    rules = domain(
        direction=torch.tensor([direction, -direction, 0, 0, 0]),
        immutable=torch.tensor([False, False, still, still, still]),
    )
    made = project(rules, x, torch.randn(30, 5, generator=generator) * 4)
    assert not violations(rules, x, made).any()
    assert project(rules, x, made).equal(made)


@pytest.mark.parametrize(
    ("changed", "rules"),
    [
        ({0: 3.0}, {}),  # outside the range
        ({0: 0.6}, {}),  # off the grid
        ({0: 0.0}, {"direction": torch.tensor([1.0, 0, 0, 0, 0])}),  # fell
        ({1: 0.5}, {"immutable": torch.tensor([False, True, False, False, False])}),
        ({2: 1.0}, {}),  # two categories at once
        ({3: 0.0}, {}),  # no category
        ({2: 0.5, 3: 0.5}, {}),
    ],
)
def test_every_break_is_seen(changed, rules):
    broken = ORIGINAL.clone()
    for position, value in changed.items():
        broken[0, position] = value
    assert violations(domain(**rules), ORIGINAL, broken).any()
    assert not violations(domain(**rules), ORIGINAL, ORIGINAL).any()


def test_gradients_pass_straight_through_except_where_nothing_may_move():
    rules = domain(immutable=torch.tensor([False, True, False, False, False]))
    proposed = torch.tensor([[9.0, 9.0, 0.1, 0.2, 0.7]], requires_grad=True)
    made = straight_through(rules, ORIGINAL, proposed)
    made.sum().backward()
    assert made.detach().equal(project(rules, ORIGINAL, proposed.detach()))
    assert proposed.grad.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]


@pytest.fixture
def table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lines = ["age,rate,size,job,label"]
    for row in range(ROWS):
        share, size = torch.rand(2, generator=generator).tolist()
        lines.append(f"{20 + row % 40},{share:.2f},{size},{'abc'[row % 3]},{row % 2}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return load_data(DataSection(source=f"csv:{path}", target="label", calibration=8, validation=8), seed=0)


def test_domain_of_a_table(table):
    rules = domain_of(table, CounterfactualSection(ranges={"age": (30, 40)}, immutable=["job"], falls=["size"]))
    assert rules.step.tolist() == [1.0, 0.01, 0.0, 0.0, 0.0, 0.0]
    raw = torch.stack([rules.low[0], rules.high[0]]).double() * rules.scale[0] + rules.offset[0]
    assert raw.tolist() == pytest.approx([30, 40], abs=1e-4)
    assert rules.immutable.tolist() == [False, False, False, True, True, True]
    assert rules.direction.tolist() == [0, 0, -1, 0, 0, 0]
    assert rules.groups == ((3, 4, 5),)
    x, _ = table.test.take(range(len(table.test)))
    made = project(rules, x, x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert not violations(rules, x, made).any()
    ages = (made[:, 0].double() * rules.scale[0] + rules.offset[0])[made[:, 0] != x[:, 0]]
    assert len(ages)
    assert (ages - ages.round()).abs().max() < 1e-4
    assert bool((made[:, 2] <= x[:, 2]).all())


def test_rise_and_fall_together_mean_stay(table):
    rules = domain_of(table, CounterfactualSection(rises=["age"], falls=["age"]))
    assert rules.immutable.tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"immutable": ["agge"]}, "no column 'agge'"),
        ({"rises": ["job"]}, "categorical"),
        ({"ranges": {"age": (9, 3)}}, "is empty"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(table, section, said):
    with pytest.raises(UsageError, match=said):
        domain_of(table, CounterfactualSection(**section))


def test_images_have_a_pixel_range_and_no_columns():
    normalized = {"normalize": {"mean": [0.5], "std": [0.25]}}
    data = load_data(DataSection(source="sklearn:digits", calibration=8, validation=8, **normalized), seed=0)
    rules = domain_of(data, CounterfactualSection())
    assert (float(rules.low), float(rules.high)) == (-2.0, 2.0)
    with pytest.raises(UsageError, match="is for tables"):
        domain_of(data, CounterfactualSection(immutable=["x"]))


def test_a_rare_category_is_no_violation(tmp_path):
    jobs = ["z" if row < 6 else "ab"[row % 2] for row in range(4000)]
    lines = ["size,job,label", *(f"{row / 7},{job},{row % 2}" for row, job in enumerate(jobs))]
    (tmp_path / "rare.csv").write_text("\n".join(lines) + "\n")
    data = load_data(
        DataSection(source=f"csv:{tmp_path / 'rare.csv'}", target="label", calibration=8, validation=8), seed=0
    )
    rules = domain_of(data, CounterfactualSection())
    (group,) = rules.groups
    assert len(group) == 3
    x, _ = data.train.take([0])
    for position in group:
        proposed = x.clone()
        proposed[0, list(group)] = 0.0
        proposed[0, position] = 1.0
        made = project(rules, x, proposed)
        assert made[0, position] == 1
        assert not violations(rules, x, made).any()


def test_a_range_off_the_grid_is_kept_all_the_same(table):
    rules = domain_of(table, CounterfactualSection(ranges={"age": (30.4, 39.6), "rate": (0.3, 0.7)}))
    raw = torch.stack([rules.low, rules.high]).double() * rules.scale + rules.offset
    assert raw[:, 0].tolist() == pytest.approx([31, 39], abs=1e-4)
    assert raw[:, 1].tolist() == pytest.approx([0.3, 0.7], abs=1e-6)
    x, _ = table.test.take(range(len(table.test)))
    for far in (-9.0, 9.0):
        assert not violations(rules, x, project(rules, x, x + far)).any()
    with pytest.raises(UsageError, match="is empty"):
        domain_of(table, CounterfactualSection(ranges={"age": (30.2, 30.8)}))
