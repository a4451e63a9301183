"""Recipes: defaults, overrides, and faults with file, line and key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_compress.errors import RecipeError
from causal_compress.recipe import DataSection, ModelSection, PlanSection, Recipe
from causal_compress.recipe_file import load_recipe, recipe_sha256, recipe_yaml


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def fault(folder: Path, text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, text))
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return str(caught.value)


def override_fault(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, overrides)
    return str(caught.value)


def test_no_file_gives_the_defaults() -> None:
    assert load_recipe(None) == Recipe()


def test_a_file_with_comments_only_gives_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "# nothing yet\n")) == Recipe()


def test_values_arrive(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, "seed: 7\nplan: {max_span: 2}\nexport: {max_abs_diff: 1e-4}\ndistill: null\n")
    )
    assert (recipe.seed, recipe.plan.max_span, recipe.export.max_abs_diff, recipe.distill) == (7, 2, 1e-4, None)


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\ndistill: null\n")
    recipe = load_recipe(path, ["seed=2", "seed=3", "distill.epochs=4", "data.normalize.mean=[0.485,0.456,0.406]"])
    assert (recipe.seed, recipe.data.normalize.mean) == (3, [0.485, 0.456, 0.406])
    assert recipe.distill is not None
    assert recipe.distill.epochs == 4


def test_an_override_may_switch_a_section_off() -> None:
    assert load_recipe(None, ["distill=null"]).distill is None


def test_yaml_1_2_scalars_stay_what_they_look_like() -> None:
    recipe = load_recipe(None, ["model.args={a: 1e-3, b: no, c: 2024-01-01, d: 1:30, e: 010}"])
    assert recipe.model.args == {"a": 1e-3, "b": "no", "c": "2024-01-01", "d": "1:30", "e": "010"}


def test_percent_with_decimals_are_not_rounded_in_the_hint(tmp_path: Path) -> None:
    assert "For 1.5 % write 0.015." in fault(tmp_path, "plan:\n  widths: [1.5]\n")


def test_house_examples_of_messages(tmp_path: Path) -> None:
    text = "plan:\n  max_los_rise: 3\n  max_spam: 3\n  widths:\n    - 0.5\n    - 30\n"
    message = fault(tmp_path, text)
    assert f"{tmp_path}/recipe.yaml:3: unknown key 'plan.max_spam'. Did you mean 'plan.max_span'?" in message
    assert "recipe.yaml:6: plan.widths[1] must be a number in (0, 1], got 30. For 30 % write 0.30." in message
    assert "recipe.yaml:2: unknown key 'plan.max_los_rise'" in message
    assert message.startswith("3 faults")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "distill:\n  precision: fp31\n",
            "2: distill.precision must be one of 'auto', 'fp32', 'bf16', got 'fp31'. Did",
        ),
        ("intervene:\n  fraction: 1\n", "2: intervene.fraction must be a number in (0, 1), got 1."),
        ("intervene: {grid: true}\n", "1: intervene.grid must be a whole number > 0, got true."),
        ("distill:\n  epochs: '3'\n", "2: distill.epochs must be a whole number >= 0, got '3'. Remove the quotes."),
        ("data:\n  mean: [1]\n", "2: unknown key 'data.mean'. Did you mean 'data.normalize.mean'?"),
        ("frobnicate: 1\n", "1: unknown key 'frobnicate'. Allowed here: model, data"),
        ("plan: 3\n", "1: plan must be a mapping, got 3."),
        ("prune: null\n", "1: prune must be a mapping, got nothing (null)."),
        ("benchmark: {batches: []}\n", "1: benchmark.batches must be a non-empty list"),
        (
            "data: {target_groups: {a: 3}}\n",
            "1: data.target_groups.a must be a list (each text or a whole number) or",
        ),
        ("seed: .inf\n", "1: seed must be a whole number in [0, 9223372036854775807], got inf."),
        (f"seed: {2**63}\n", "1: seed must be a whole number in [0, 9223372036854775807], got 9223372036854775808."),
        ("plan: {temperature: .nan}\n", "1: plan.temperature must be a number > 0, got nan."),
        ("device: gpu\n", "1: device must be auto, cpu, cuda or cuda:N, got 'gpu'."),
        ("seed: 1\n\nseed: 2\n", "3: the key 'seed' is there twice, first on line 1."),
        ("plan:\n  depth: true\n  depth: false\n", "3: the key 'plan.depth' is there twice"),
        (
            "model:\n  args: !!python/object:os.system {}\n",
            "2: model.args has the YAML tag '!!python/object",
        ),
        ("!!python/object/apply:os.system [id]\n", "1: the recipe has the YAML tag"),
        ("seed: !!int abc\n", "1: seed can't be read as int: abc"),
        ("plan:\n\tdepth: true\n", "2: not valid YAML: found character '\\t'"),
        ("plan: [1, 2\n", "not valid YAML"),
        ("- 1\n- 2\n", "1: a recipe must be a mapping of sections, got [1, 2]."),
        ("just text\n", "1: a recipe must be a mapping of sections, got 'just text'."),
        ("seed: 1\n---\nseed: 2\n", "2: not valid YAML"),
        ("plan: &p {depth: true}\ngroup: *p\n", "2: the alias '*p' is not allowed"),
        ("? [1, 2]\n: 3\n", "1: a key must be plain text."),
        ("[" * 51 + "]" * 51, "recipe.yaml:1: nested too deeply."),
        ("seed: 1\nmodel: " + "[" * 900 + "]" * 900, "recipe.yaml:2: nested too deeply."),
        (b"seed: \x00\n", "not valid YAML"),
        (b"report: {title: \xe9}\n", "is not UTF-8 text"),
    ],
)
def test_a_fault_is_located_and_explained(tmp_path: Path, text: str | bytes, wanted: str) -> None:
    assert wanted in fault(tmp_path, text)


def test_all_faults_come_at_once_in_the_file_s_order(tmp_path: Path) -> None:
    text = "seed: -1\nplan:\n  max_spam: 1\nbudget: {macs: 55}\nseed: 2\n"
    lines = fault(tmp_path, text).splitlines()
    places = [line.partition("recipe.yaml:")[2].partition(":")[0] for line in lines[1:-1]]
    assert places == ["1", "3", "4", "5"]


def test_a_message_stays_on_one_screen(tmp_path: Path) -> None:
    message = fault(tmp_path, "".join(f"key_{index}: 1\n" for index in range(200)))
    assert "200 faults" in message
    assert "and 180 more" in message
    assert len(message.splitlines()) < 25


@pytest.mark.parametrize("missing", ["nowhere.yaml", "."])
def test_a_file_that_can_t_be_read(tmp_path: Path, missing: str) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / missing)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("seed", "--set seed: wanted section.key=value"),
        ("=3", "wanted section.key=value"),
        ("plan..depth=1", "wanted section.key=value"),
        ("seed=", "--set seed=: seed must be a whole number in [0, 9223372036854775807], got nothing (null)."),
        (
            "budget.macs=55",
            "--set budget.macs=55: budget.macs must be a number in (0, 1] or null, got 55. For 55 %",
        ),
        ("seed.x.y=1", "seed must be a whole number"),
        ("plan.max_spam=1", "--set plan.max_spam=1: unknown key 'plan.max_spam'. Did you mean 'plan.max_span'?"),
        ("data.normalize.mean=[0.4", "--set data.normalize.mean=[0.4: not valid YAML"),
        ("export.opset=!!python/name:os.system x", "has the YAML tag '!!python/name:os.system'"),
        ("plan={max_span: 0}", "plan.max_span must be a whole number > 0, got 0."),
    ],
)
def test_a_fault_in_an_override_names_the_override(override: str, wanted: str) -> None:
    assert wanted in override_fault(override)


def test_an_override_can_t_enter_a_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'seed' is not a section, it can't hold 'x'"):
        load_recipe(written(tmp_path, "seed: 3\n"), ["seed.x=1"])


def test_faults_of_the_file_and_of_overrides_come_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)recipe\.yaml:1: seed must.*--set budget\.macs=2: budget\.macs must"):
        load_recipe(written(tmp_path, "seed: -1\n"), ["budget.macs=2"])


def test_an_override_that_mends_the_file_s_fault_is_accepted(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "seed: -1\n"), ["seed=1"]).seed == 1


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    args=st.dictionaries(st.text(), plain_values, max_size=4),
    source=st.none()
    | st.text()
    | st.sampled_from(["1e-3", "no", "null", "12", "~", "0x1", "1_000", ".5", "2024-01-01"]),
    target=st.none() | st.text() | st.integers(),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    share=st.floats(min_value=0, max_value=1, exclude_min=True),
)
def test_recipe_to_yaml_to_recipe(
    tmp_path_factory: pytest.TempPathFactory,
    args: dict[str, Any],
    source: str | None,
    target: str | int | None,
    seed: int,
    share: float,
) -> None:
    data = DataSection(source=source, target=target, test_share=share)
    recipe = Recipe(model=ModelSection(args=args), data=data, seed=seed, distill=None)
    again = load_recipe(written(tmp_path_factory.mktemp("recipe"), recipe_yaml(recipe)))
    assert again == recipe
    assert recipe_sha256(again) == recipe_sha256(recipe)


def test_the_hash_follows_the_meaning(tmp_path: Path) -> None:
    spelt_out = load_recipe(written(tmp_path, "# a comment\nplan: {depth: true}\nseed: 0\n"))
    assert recipe_sha256(spelt_out) == recipe_sha256(Recipe())
    assert recipe_sha256(Recipe(seed=1)) != recipe_sha256(Recipe())


def test_reading_a_recipe_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, causal_compress.recipe_file as f; f.load_recipe(None); "
    code += "print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_alignment_may_be_named_after_its_target(monkeypatch):
    assert [PlanSection(align=name).align for name in ("int8", "tensor-cores", 5, "12")] == [16, 8, 5, 12]
    for capability, width in (("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda known=capability: known)
        assert PlanSection(align="cpu").align == width
    with pytest.raises(RecipeError, match=r"plan\.align must be .* 'cpu', 'int8', 'tensor-cores'"):
        load_recipe(None, ["plan.align=gpu"])
