"""Which change cost the most: a sabotaged decision must be named; what is undone stays undone in the next plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_runs import digits_recipe, train

from causal_compress.cli import main
from causal_compress.commands.shared import chosen_recipe
from causal_compress.errors import UsageError
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import BudgetSection, PlanSection, Recipe
from causal_compress.results import Candidate, Candidates, Change, Decision, Effects, Evidence, Groups, Plan
from causal_compress.shrink.bisect import Case, bisect, carry_out, with_inputs
from causal_compress.shrink.measure import measure
from causal_compress.shrink.plan import make_plan
from causal_compress.shrink.undo import leaves_whole, taken_back, whole_regions
from causal_compress.stages import probe_of
from causal_compress.understand.cost import count_macs
from causal_compress.understand.group import group
from causal_compress.understand.intervene import intervene
from causal_compress.understand.trace import trace

UNKNOWN = Evidence(cka=None, same_node_share=None, ace=None, relative_error=None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("teacher") / "teacher.safetensors", epochs=2)


@dataclasses.dataclass(frozen=True)
class Known:
    """The digits' network, understood."""

    recipe: Recipe
    effects: Effects
    groups: Groups
    case: Case


@pytest.fixture(scope="module")
def known(weights: Path) -> Known:
    recipe = digits_recipe(weights)
    data = load_data(recipe.data, seed=0)
    network = trace(build_model(recipe.model), data.example_input)
    effects = intervene(network, data.calibration, data.features, recipe.intervene, seed=0)
    groups = group(effects, recipe.group, seed=0)
    probe = probe_of(recipe, data)
    candidates = measure(network, probe, effects, recipe.plan)
    plan = make_plan(candidates, effects, groups, BudgetSection(macs=0.6), PlanSection())
    case = Case(
        network, plan, candidates, probe, data.validation, recipe.rewrite, recipe.prune, recipe.plan.temperature
    )
    return Known(recipe, effects, groups, with_inputs(case, 64))


def decided(row: Candidate, known: Known, **changed: object) -> Decision:
    regions = known.case.network.chain().regions
    span = regions[row.first : row.last + 1]
    values = {
        "node": span[0].name,
        "kind": "narrow" if row.widths else "keep",
        "candidate": row,
        "outputs_kept": 1.0,
        "evidence": UNKNOWN,
        "predicted_harm_kl": 0.0,
        "macs_before": sum(region.macs for region in span),
        "macs_after": round(row.macs_fixed + row.macs_out),
        "params_before": sum(region.params for region in span),
        "params_after": round(row.params_fixed + row.params_out),
        "refused": (),
    }
    return Decision(**{**values, **changed})  # type: ignore[arg-type]


def plan_of(decisions: list[Decision]) -> Plan:
    return Plan(decisions=tuple(decisions), macs=1.0, params=1.0, predicted_harm_kl=0.0, front=(), skipped=())


def whole_row(candidates: Candidates, region: int) -> Candidate:
    rows = [row for row in candidates.rows if (row.first, row.last) == (region, region)]
    return next(row for row in rows if not row.widths and row.inputs_kept == 1.0)


def narrowed_rows(candidates: Candidates, region: int) -> list[Candidate]:
    """Widest first."""
    rows = [row for row in candidates.rows if (row.first, row.last) == (region, region) and row.widths]
    return sorted(rows, key=lambda row: -sum(row.widths.values()))


def sabotaged(known: Known, worst: int) -> tuple[Plan, list[str]]:
    """Every region that can be narrowed is, a little; one is to next to nothing, and the plan calls that harmless."""
    candidates, decisions, changed = known.case.candidates, [], []
    for region in range(candidates.regions):
        rows = narrowed_rows(candidates, region)
        row = whole_row(candidates, region) if not rows else rows[0]
        if region == worst:
            row = dataclasses.replace(row, widths=dict.fromkeys(row.widths, 1), harm_kl=0.0)
        decisions.append(decided(row, known))
        changed += [decisions[-1].node] if row.widths else []
    return plan_of(decisions), changed


def able(known: Known) -> list[int]:
    return [r for r in range(known.case.candidates.regions) if narrowed_rows(known.case.candidates, r)]


def test_the_planted_worst_change_is_named_wherever_it_is(known: Known) -> None:
    assert len(able(known)) >= 2
    for worst in (able(known)[0], able(known)[-1]):
        plan, changed = sabotaged(known, worst)
        found = bisect(dataclasses.replace(known.case, plan=plan), (), distilled=True)
        culprit = plan.decisions[worst].node
        first, *others = found.undone
        assert first.node == culprit
        assert sorted(one.node for one in found.undone) == sorted(changed)
        assert first.harm_removed_kl.low > 0.0
        assert first.harm_removed_kl.value > max(one.harm_removed_kl.value for one in others)
        assert first.heldout_kl == pytest.approx(found.heldout_kl - first.harm_removed_kl.value)
        assert first.macs_given_back > 0
        assert first.params_given_back > 0
        assert first.accuracy.n == found.accuracy.n == 200
        assert any("distilled" in note for note in found.notes)


def test_the_ledger_decides_which_few_are_tried(known: Known) -> None:
    worst = able(known)[-1]
    plan, changed = sabotaged(known, worst)
    culprit = plan.decisions[worst].node

    def noted(node: str, harm: float) -> Change:
        return Change(
            node=node,
            what="narrowed",
            evidence=None,
            predicted_harm_kl=None,
            measured_harm_kl=harm,
            relative_error=None,
            penalty=None,
        )

    ledger = [noted(node, 0.5 if node == culprit else 0.01) for node in changed] + [noted(culprit, 0.25)]
    found = bisect(dataclasses.replace(known.case, plan=plan), ledger, top=1)
    assert [one.node for one in found.undone] == [culprit]
    assert found.undone[0].ledger_harm_kl == 0.75
    assert found.undone[0].what == ("narrowed", "narrowed")
    assert sorted(skip.what for skip in found.skipped) == sorted(set(changed) - {culprit})
    assert all("not among the 1 largest" in skip.reason for skip in found.skipped)


def test_a_plan_with_its_only_change_taken_back_is_the_teacher(known: Known) -> None:
    region = able(known)[0]
    candidates, network = known.case.candidates, known.case.network
    rows = [whole_row(candidates, r) for r in range(candidates.regions)]
    rows[region] = narrowed_rows(candidates, region)[-1]
    plan = plan_of([decided(row, known) for row in rows])
    found = bisect(dataclasses.replace(known.case, plan=plan), ())
    (one,) = found.undone
    assert one.heldout_kl == pytest.approx(0.0, abs=1e-6)
    macs = count_macs(network.graph, network.example_input[:1])
    assert found.macs + one.macs_given_back == macs
    assert not any("distilled" in note for note in found.notes)


def test_what_a_plan_takes_back_is_replaced_by_the_regions_themselves(known: Known) -> None:
    """A merge becomes its regions; a narrowed input becomes whole, and the part before it writes all channels again."""
    candidates, regions = known.case.candidates, known.case.network.chain().regions
    merge = next(row for row in candidates.rows if row.last > row.first)
    rows = [whole_row(candidates, r) for r in range(candidates.regions)]
    before, after = rows[: merge.first], rows[merge.last + 1 :]
    plan = plan_of([decided(row, known) for row in [*before, merge, *after]])
    undone = taken_back(plan, len(before), candidates, regions)
    assert [d.candidate for d in undone.decisions] == rows
    assert undone.macs == pytest.approx(1.0)
    assert undone.params == pytest.approx(1.0)
    narrow = dataclasses.replace(rows[1], inputs_kept=0.5)
    wide = decided(rows[0], known, outputs_kept=0.5)
    plan = plan_of([wide, decided(narrow, known, kind="narrow"), *(decided(row, known) for row in rows[2:])])
    undone = taken_back(plan, 1, candidates, regions)
    assert [d.outputs_kept for d in undone.decisions] == [1.0] * len(rows)
    assert [d.candidate for d in undone.decisions] == rows
    still = taken_back(plan, 0, candidates, regions)
    assert still.decisions[0].outputs_kept == 0.5, "what the next decision takes stays that decision's"


def test_undone_nodes_stay_whole_and_the_budget_is_met_by_the_others(known: Known) -> None:
    case, budget = known.case, BudgetSection(macs=0.7)
    usual = make_plan(case.candidates, known.effects, known.groups, budget, PlanSection())
    victim = next(d for d in usual.decisions if d.kind != "keep" and d.macs_after < d.macs_before)
    plan = make_plan(case.candidates, known.effects, known.groups, budget, PlanSection(undo=[victim.node]))
    inside = set(range(victim.candidate.first, victim.candidate.last + 1))
    for decision in plan.decisions:
        row = decision.candidate
        if inside & set(range(row.first, row.last + 1)):
            assert decision.kind == "keep"
            assert decision.outputs_kept == 1.0
            assert decision.macs_after == decision.macs_before
    assert plan.macs <= 0.7
    assert plan.predicted_harm_kl >= usual.predicted_harm_kl
    assert victim.node in [skip.what for skip in plan.skipped]
    student = carry_out(dataclasses.replace(case, plan=plan), plan)
    inner = [name for r in inside for name in case.network.regions[r].info.modules]
    before, after = dict(case.network.graph.named_parameters()), dict(student.graph.named_parameters())
    for name, value in before.items():
        if any(name.startswith(f"{module}.") for module in inner):
            assert after[name].shape == value.shape


def test_names_are_those_of_the_ledger(known: Known) -> None:
    regions = known.case.network.chain().regions
    names = [region.name for region in regions]
    assert whole_regions([names[1]], regions) == {1}
    assert whole_regions([f"{names[0]}..{names[2]}"], regions) == {0, 1, 2}
    assert whole_regions([], regions) == frozenset()
    with pytest.raises(UsageError, match=f"did you mean '{names[1]}'"):
        whole_regions([names[1] + "x"], regions)
    with pytest.raises(UsageError, match="runs backwards"):
        whole_regions([f"{names[2]}..{names[0]}"], regions)
    with pytest.raises(UsageError, match="no node is called"):
        whole_regions([f"{names[0]}..nowhere"], regions)


def test_what_touches_a_whole_region_is_left_out(known: Known) -> None:
    base = whole_row(known.case.candidates, 1)
    change = dataclasses.replace
    assert leaves_whole(base, frozenset({1}))
    assert not leaves_whole(change(base, widths={"conv": 2}), frozenset({1}))
    assert not leaves_whole(change(base, last=2), frozenset({2}))
    assert not leaves_whole(change(base, inputs_kept=0.5), frozenset({1}))
    assert not leaves_whole(change(base, inputs_kept=0.5), frozenset({0})), "it would take channels of region 0"
    assert leaves_whole(change(base, widths={"conv": 2}), frozenset({0, 2}))


def test_the_flag_reaches_the_recipe() -> None:
    recipe = chosen_recipe(
        recipe=None, settings=(), seed=None, undo=("a", "b..c"), arch="m.py:f", weights=None, data="npz:x"
    )
    assert recipe.plan.undo == ["a", "b..c"]
    recipe = chosen_recipe(
        recipe=None, settings=["plan.undo=[z]"], seed=None, undo=(), arch="m.py:f", weights=None, data="npz:x"
    )
    assert recipe.plan.undo == ["z"]


def test_audit_and_bisect_of_a_finished_run(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from causal_compress.pipeline import compress

    audited = {"map_inputs": 64, "attribution_inputs": 8, "masks": 64, "corruption_inputs": 40, "resamples": 50}
    recipe = digits_recipe(weights, distill=None, benchmark=None, audit=audited)
    run = tmp_path / "run"
    compress(recipe, run)
    before, own = {path.name for path in run.iterdir()}, (run / "audit.json").read_bytes()
    apart = ["--apart", str(weights)]
    assert main(["audit", str(run), "--inputs", "120", "--groups", "class", "-q", *apart]) == 0
    told = capsys.readouterr().out
    assert "McNemar" in told
    assert "not measured" in told
    assert (run / "audit.json").read_bytes() == own, "the run's own audit, which run.json vouches for"
    assert "audit-later.json" in told
    audit = json.loads((run / "audit-later.json").read_text())
    assert (audit["n"], audit["split"], audit["corruptions"][0]["compared"]["teacher"]["n"]) == (120, "validation", 40)
    assert audit["attribution"]["apart"]["value"] == pytest.approx(audit["attribution"]["floor"]["value"])
    assert json.loads((run / "report.json").read_text())["audit"]["n"] == 120, "the later one is told"
    prune = json.loads((run / "prune.json").read_text())
    assert main(["bisect", str(run), "--top", "1", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heldout_kl"] == pytest.approx(prune["heldout_kl"], rel=1e-4), "the run's own surgery, made again"
    assert found["macs"] == prune["macs"]
    assert found["accuracy"] == prune["validation"]
    assert len(found["undone"]) == 1
    assert {path.name for path in run.iterdir()} == before | {"audit-later.json", "bisect.json"}
    assert json.loads((run / "bisect.json").read_text())["undone"][0]["node"] == found["undone"][0]["node"]
    assert "Every change undone alone" in (run / "report.html").read_text()
    compress(recipe, run)  # nothing to do, but the report is written again
    assert "Every change undone alone" in (run / "report.html").read_text()
    assert json.loads((run / "report.json").read_text())["audit"]["n"] == 120
    torch.manual_seed(5)
    model = build_model(recipe.model.model_copy(update={"weights": None}))
    torch.save(model.state_dict(), tmp_path / "other.pt")
    text = (run / "recipe.resolved.yaml").read_text().replace(str(weights), str(tmp_path / "other.pt"))
    (run / "recipe.resolved.yaml").write_text(text)
    assert main(["audit", str(run), "-q"]) == 1
    assert "the teacher of" in capsys.readouterr().err
