"""Training, finding, keeping and showing counterfactuals of rows, on a small problem whose answers are known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counterfactual_sample import SMALL, check, turned, untrained
from torch import nn

from causal_compress.cli import main
from causal_compress.commands.counterfactual import _show_contrast
from causal_compress.counterfactual import contrast as contrasting
from causal_compress.counterfactual.constraints import Domain
from causal_compress.counterfactual.contrast import contrast, parting_site
from causal_compress.counterfactual.explainer import Found, _refine, describe, find, target_of, train_counterfactuals
from causal_compress.counterfactual.folder import DESCRIPTION, WEIGHTS, load_explainer, save_explainer
from causal_compress.counterfactual.page import counterfactual_page
from causal_compress.counterfactual.training import judge_of, other_classes, suspicions, target_loss
from causal_compress.errors import CheckpointError, NumericalError, UsageError
from causal_compress.inputs.data import load_data
from causal_compress.recipe import CounterfactualSection, DataSection
from causal_compress.results import SitePart
from causal_compress.understand.teacher import weights_sha256
from causal_compress.understand.trace import trace

SCALES = {"mean": [0] * 3, "std": [1, 1, 10]}


class Sum(nn.Module):
    """Class 1 where the first two numbers sum to more than 0; the rest of the row is not looked at."""

    def __init__(self, inputs=6):
        super().__init__()
        self.first = nn.Linear(inputs, 4)
        self.last = nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[:2, :2] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
            self.first.bias.zero_()
            self.last.weight.copy_(torch.tensor([[0.0, 3.0, 0, 0], [3.0, 0.0, 0, 0]]))
            self.last.bias.zero_()

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def sum_net():
    return Sum()


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    draws = np.random.default_rng(0)
    values = draws.normal(size=(400, 3))
    lines = ["a,b,size,job,label"]
    for a, b, size in values:
        lines.append(f"{a},{b},{round(10 * size)},{'xyz'[draws.integers(3)]},{'yes' if a + b > 0 else 'no'}")
    path = tmp_path_factory.mktemp("table") / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def table(csv):
    section = DataSection(
        source=f"csv:{csv}",
        target="label",
        calibration=60,
        validation=80,
        normalize=SCALES,
    )
    return load_data(section, seed=0)


@pytest.fixture(scope="module")
def network(table):
    return trace(Sum(), table.example_input)


@pytest.fixture(scope="module")
def explainer(network, table):
    return train_counterfactuals(network, table, SMALL, seed=0)


def test_a_trained_generator_turns_rows_without_breaking_constraints(explainer, table):
    x, target = turned(explainer, table.test)
    found = find(explainer, x, target)
    assert found.valid.float().mean() > 0.9
    assert explainer.judge(found.counterfactual)[1].argmax(1).equal(found.answered)
    told = describe(explainer, found, table.test, range(len(x)))
    assert {one.status for one in told if one.answered_class == one.target_class} == {"valid"}
    assert sum(one.violations for one in told) == 0
    assert all(one.l0 >= 1 for one in told if one.status == "valid")
    assert told[0].true_class == table.classes[int(table.test.labels[0])]
    shown = {change.feature: change for one in told for change in one.changes}
    assert set(shown) <= {"a", "b", "size", "job"}
    assert all(change.before != change.after for one in told for change in one.changes if change.feature == "job")


def test_only_what_may_change_changes(network, table):
    section = SMALL.model_copy(update={"immutable": ["b", "job"], "rises": ["a"], "steps": 60})
    explainer = train_counterfactuals(network, table, section, seed=0)
    x, target = turned(explainer, table.test)
    found = find(explainer, x, target)
    assert found.counterfactual[:, [1, 3, 4, 5]].equal(x[:, [1, 3, 4, 5]])
    assert bool((found.counterfactual[:, 0] >= x[:, 0]).all())
    assert bool((found.counterfactual[:, 0] > x[:, 0]).any())
    to_no = target == table.classes.index("no")  # would need a to fall
    assert not found.valid[to_no].any()
    assert {found.status[row] for row in torch.nonzero(to_no)[:, 0]} <= {"invalid", "not converged"}


def test_the_same_seed_gives_the_same_generator(network, table):
    section = SMALL.model_copy(update={"steps": 5, "checks": 1})
    one, same, other = (train_counterfactuals(network, table, section, seed=seed) for seed in (3, 3, 4))
    weights = [torch.cat([p.flatten() for p in made.generator.parameters()]) for made in (one, same, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_training_leaves_network_and_random_state_alone(network, table):
    before, state = weights_sha256(network.graph), torch.get_rng_state()
    train_counterfactuals(network, table, SMALL.model_copy(update={"steps": 2, "checks": 1}), seed=0)
    assert weights_sha256(network.graph) == before
    assert all(parameter.requires_grad for parameter in network.graph.parameters())
    assert torch.get_rng_state().equal(state)


def test_divergence_ends_training_with_an_error(network, table):
    with pytest.raises(NumericalError, match="diverged at step"):
        train_counterfactuals(network, table, SMALL.model_copy(update={"learning_rate": 1e6}), seed=0)


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ([check(), check()], []),
        ([check(), check(diversity=0.05)], ["mode collapse"]),
        ([check(critic_accuracy_pct=100.0), check(critic_accuracy_pct=100.0)], ["teaches little"]),
        ([check(), check(validity_pct=85.0)], ["divergence"]),
        ([check(validity_pct=40.0)], ["only 40.0 %"]),
    ],
)
def test_what_training_is_watched_for(checks, said):
    found = suspicions(checks)
    assert len(found) == len(said)
    assert all(part in warning for part, warning in zip(said, found, strict=True))


def test_target_loss_stops_at_the_confidence():
    logits = torch.tensor([[10.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = target_loss(logits, torch.tensor([0, 0]), 0.9)
    loss.backward()
    assert loss.item() == pytest.approx((np.log(0.9) - np.log(0.5)) / 2, abs=1e-6)
    assert logits.grad[0].tolist() == [0, 0]
    assert logits.grad[1, 0] < 0


def test_other_classes_are_never_the_same():
    labels = torch.arange(1000) % 4
    other = other_classes(labels, 4, torch.Generator().manual_seed(0))
    assert not (other == labels).any()
    assert set(other[labels == 0].tolist()) == {1, 2, 3}


def test_targets_are_checked(explainer, table):
    x, target = turned(explainer, table.test, 2)
    with pytest.raises(UsageError, match="already"):
        find(explainer, x, 1 - target)
    with pytest.raises(UsageError, match="no class"):
        find(explainer, x, target + 5)
    with pytest.raises(UsageError, match="no class 'maybe'"):
        target_of(explainer, "maybe")
    with pytest.raises(UsageError, match="no site 'nowhere'"):
        judge_of(trace(Sum(), table.example_input), "nowhere", torch.device("cpu"))


def test_refinement_turns_what_the_generator_does_not(network, table):
    section = SMALL.model_copy(update={"refine_steps": 0})
    still = untrained(network, table, section)
    x, target = turned(still, table.test)
    before = find(still, x, target).valid.float().mean()
    moved = replace(still, section=section.model_copy(update={"refine_steps": 80}))
    found = find(moved, x, target)
    assert found.valid.float().mean() > before + 0.3
    assert not (found.counterfactual[:, 3:].sum(1) - 1).any()
    alone = find(moved, x[3:4], target[3:4])  # what else is in the batch makes no difference
    assert alone.counterfactual.allclose(found.counterfactual[3:4], atol=1e-4)


def test_an_explainer_survives_its_folder(explainer, network, table, tmp_path):
    save_explainer(explainer, tmp_path / "made")
    again = load_explainer(tmp_path / "made", network)
    x, target = turned(explainer, table.test, 8)
    assert find(again, x, target).counterfactual.equal(find(explainer, x, target).counterfactual)
    assert (again.trained, again.section, again.classes) == (explainer.trained, explainer.section, explainer.classes)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [DESCRIPTION, WEIGHTS]


def test_damaged_and_foreign_folders_are_refused(explainer, network, table, tmp_path):
    save_explainer(explainer, tmp_path)
    other = Sum()
    with torch.no_grad():
        other.first.weight[0, 0] = 2
    with pytest.raises(CheckpointError, match="another network"):
        load_explainer(tmp_path, trace(other, table.example_input))
    with pytest.raises(CheckpointError, match="no trained counterfactuals"):
        load_explainer(tmp_path / "absent", network)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_explainer(tmp_path, network)
    (tmp_path / DESCRIPTION).write_text('{"schema_number": 2}')
    with pytest.raises(CheckpointError, match="damaged"):
        load_explainer(tmp_path, network)


def site(name, distance, floor):
    effects = {"ace_original": 0.0, "ace_original_stderr": 0.0}
    effects |= {"ace_counterfactual": 0.0, "ace_counterfactual_stderr": 0.0}
    return SitePart(site=name, distance=distance, floor=floor, **effects)


def test_the_parting_site_is_the_first_of_those_up_to_the_output():
    sites = (site("a", 2, 1), site("b", 0.5, 1), site("c", 2, 1), site("d", 3, 1))
    assert parting_site(sites) == "c"
    assert parting_site(sites[:2]) is None
    assert parting_site(sites[2:]) == "c"


def test_contrast_sees_units_and_effects(explainer, network, table):
    rows, labels = table.test.take(range(len(table.test)))
    sums = rows[:, :2].sum(1)
    index = int(sums.abs().argmax())
    x = rows[index : index + 1]
    predicted = explainer.judge(x)[1].argmax(1)
    flipped = x.clone()
    flipped[0, :2] = -x[0, :2]  # the units of `first` swap
    found = Found(x, flipped, predicted, 1 - predicted, 1 - predicted, torch.ones(1), ("valid",))
    told = contrast(explainer, network, found, table.test, index)
    assert [part.site for part in told.sites] == ["first", "last"]
    here, there = (float(sums[labels == klass].abs().mean()) for klass in (predicted, 1 - predicted))
    share = float(sums.abs().max()) * (here + there) / (here**2 + there**2)
    assert told.sites[0].distance == pytest.approx(share, rel=1e-4)
    assert told.parts_at == "first"
    assert all(part.ace_original > 0 for part in told.sites)
    assert told.floor_pairs == len(rows) - 2
    assert told.counterfactual.l0 == 2
    same = contrast(explainer, network, replace(found, counterfactual=x + 0.001), table.test, index)
    assert same.parts_at is None


def test_a_run_keeps_its_folder_to_itself(csv, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "recipe.resolved.yaml").write_text("the run's own\n")
    given = ["--arch", f"{__file__}:sum_net", "--data", f"csv:{csv}", "--set", "data.target=label"]
    assert main(["counterfactual", "train", *given, "--out", str(tmp_path), "-q"]) == 1
    assert "holds a run" in capsys.readouterr().err
    assert (tmp_path / "recipe.resolved.yaml").read_text() == "the run's own\n"


def test_the_commands_train_and_show(csv, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "counterfactual: {steps: 30, width: 4, checks: 1, probe: 20, batch_size: 32}\n"
        "data: {target: label, calibration: 60, validation: 80, normalize: {mean: [0, 0, 0], std: [1, 1, 10]}}\n"
    )
    out = tmp_path / "made"
    given = ["--recipe", str(recipe), "--arch", f"{__file__}:sum_net", "--data", f"csv:{csv}", "--out", str(out), "-q"]
    assert main(["counterfactual", "train", *given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["training"]["steps"] == 30
    assert json.loads((out / "bias.json").read_text()) == printed["bias"]
    asked = ["counterfactual", "show", str(out), "--index", "0", "-q", "--target"]
    codes = {name: main([*asked, name, "--out", str(tmp_path / "one.json")]) for name in ("yes", "no")}
    assert sorted(codes.values()) == [0, 2]  # one of the two is what the network says already
    name = next(name for name, code in codes.items() if code == 0)
    told = json.loads((tmp_path / "one.json").read_text())
    assert told["counterfactual"]["target_class"] == name
    assert main([*asked, name, "--out", str(tmp_path / "one.html")]) == 0
    assert f"and not {name}?" in (tmp_path / "one.html").read_text()
    assert main([*asked, name]) == 0
    assert "usual within a class" in capsys.readouterr().out
    assert main([*asked, name, "--out", str(tmp_path / "one.png")]) == 2
    assert main([*asked, name, "--out", str(tmp_path / "one.doc")]) == 2
    assert main(["counterfactual", "show", str(out), "--index", "999", "--target", name]) == 2
    (tmp_path / "dir.html").mkdir()
    capsys.readouterr()
    assert main([*asked, name, "--out", str(tmp_path / "dir.html")]) == 1
    assert "a folder of that name" in capsys.readouterr().err
    assert main([*asked, name, "--set", f"data.source=csv:{changed(csv, tmp_path)}"]) == 1
    assert "are not what they were when it was trained" in capsys.readouterr().err


def test_a_counterfactual_is_shown_where_too_little_is_known_of_the_classes(
    explainer, network, table, capsys, monkeypatch
):
    monkeypatch.setattr(contrasting, "_LEAST", 10**6)
    x, target = turned(explainer, table.test, 1)
    found = find(explainer, x, target)
    told = contrast(explainer, network, found, table.test, 0)
    assert (told.sites, told.parts_at, told.floor_pairs) == ((), None, 0)
    assert told.counterfactual.status == found.status[0]
    page = counterfactual_page(explainer, found, told)
    assert "Not known: what is usual within a class takes 10 inputs" in page
    assert "Table of sites" not in page
    _show_contrast(told)
    printed = capsys.readouterr().out
    assert "note: where the two part in the network is not known" in printed
    assert "usual within a class  " not in printed


def test_a_search_is_set_anew_and_training_is_not(csv, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "counterfactual: {steps: 1, width: 4, checks: 1, probe: 20, batch_size: 32, refine_steps: 0}\n"
        "data: {target: label, calibration: 60, validation: 80, normalize: {mean: [0, 0, 0], std: [1, 1, 10]}}\n"
    )
    out = tmp_path / "made"
    given = ["--recipe", str(recipe), "--arch", f"{__file__}:sum_net", "--data", f"csv:{csv}", "--out", str(out), "-q"]
    assert main(["counterfactual", "train", *given]) == 0
    file = tmp_path / "one.json"

    def status(index, *settings):
        asked = ["counterfactual", "show", str(out), "--index", str(index), "-q", "--out", str(file), *settings]
        assert 0 in [main([*asked, "--target", name]) for name in ("yes", "no")]
        return json.loads(file.read_text())["counterfactual"]["status"]

    failed = next(index for index in range(20) if status(index) != "valid")
    assert status(failed, "--set", "counterfactual.refine_steps=200") == "valid"
    capsys.readouterr()
    asked = ["counterfactual", "show", str(out), "--index", "0", "--target", "yes", "-q"]
    assert main([*asked, "--set", "counterfactual.steps=9"]) == 2
    said = capsys.readouterr().err
    assert "counterfactual.steps can't be changed once the generator is trained" in said
    assert "refine_steps, proximity_weight, grid" in said
    assert main([*asked, "--set", "counterfactual.immutable=[a]"]) == 2


def changed(csv, folder):
    """The table with one more row."""
    path = folder / "changed.csv"
    path.write_text(csv.read_text() + "0.5,0.5,1,x,yes\n")
    return path


def test_a_hit_counts_whatever_its_loss():
    shares = iter(([0.45, 0.5, 0.05], [0.36, 0.34, 0.30], [0.9, 0.05, 0.05]))  # a miss with less loss than the hit
    x = torch.zeros(1, 1, 2, 2)
    bounds = {name: torch.zeros(1, 1, 1) for name in ("scale", "offset", "step", "least", "direction")}
    rules = Domain(
        low=torch.full((1, 1, 1), -9.0),
        high=torch.full((1, 1, 1), 9.0),
        immutable=torch.zeros(1, 1, 1, dtype=torch.bool),
        **bounds,
    )
    looks = []

    def decode(h, x):
        looks.append(len(looks) + 1.0)
        return x + looks[-1] + 0 * h

    def judge(candidate):
        return None, torch.tensor([next(shares)]).log() + 0 * candidate.sum()

    generator = SimpleNamespace(encode=lambda x, target: torch.randn(x.shape), decode=decode)
    section = CounterfactualSection(refine_steps=2)
    asked = SimpleNamespace(domain=rules, section=section, generator=generator, judge=judge)
    found, rising = _refine(asked, x, torch.tensor([0]), x)
    assert found.unique().tolist() == [2.0]
    assert not rising.any()


def test_class_means_come_from_anywhere_in_the_split_a_batch_at_a_time(table, network, monkeypatch):
    order = torch.argsort(table.test.labels, stable=True)  # all of one class first, as in a folder
    ordered = replace(table.test, labels=table.test.labels[order], positions=table.test.positions[order.numpy()])
    sizes = []
    monkeypatch.setattr(contrasting, "_INPUTS", 30)
    monkeypatch.setattr(contrasting, "_BATCH", 16)
    plain = contrasting._site_units
    monkeypatch.setattr(contrasting, "_site_units", lambda net, x: sizes.append(len(x)) or plain(net, x))
    axes = contrasting.class_axes(network, ordered, 0, 1)
    assert axes.pairs >= 20
    assert max(sizes) <= 16
