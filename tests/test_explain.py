"""The command `explain`: of a checkpoint, of a run, of one input; as text, JSON and page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import small_runs
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from causal_compress.cli import main
from causal_compress.commands.explaining import show_explanation
from causal_compress.errors import DataError
from causal_compress.explain.engine import open_engine
from causal_compress.explain.explaining import Question, Subject, _Asked, _decided, explain
from causal_compress.explain.page import explanation_page, pictures_of
from causal_compress.explanations import read_input
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import DataSection
from causal_compress.recipe_file import recipe_yaml
from causal_compress.results import Explanation
from causal_compress.understand.trace import trace

SMALL = {
    "masks": 64,
    "bootstraps": 20,
    "map_inputs": 16,
    "map_masks": 2,
    "class_inputs": 3,
    "class_masks": 32,
    "grid": 4,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A recipe file for a quick digits network."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = small_runs.digits_recipe(folder / "w.safetensors", explain=SMALL)
    small_runs.train(recipe, folder / "w.safetensors", epochs=3)
    path = folder / "recipe.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    return path, recipe


@pytest.fixture(scope="module")
def explained(digits):
    """An input of the digits, explained."""
    _, recipe = digits
    data = load_data(recipe.data, seed=0)
    network = trace(build_model(recipe.model), data.example_input)
    count = len(network.regions)
    subject = Subject("network", network, (tuple(range(count - 1)), (count - 1,)))
    x, label = data.validation.take([3])
    question = Question(data.validation, x=x, name="<script>alert(1)</script>", index=3, true_class=int(label))
    return explain(subject, data, recipe.explain, question, seed=0), x, data, recipe


def test_a_checkpoint_is_explained_without_compression(digits, capsys, tmp_path):
    path, _ = digits
    page = tmp_path / "page.html"
    assert main(["explain", "--recipe", str(path), "--index", "0", "--out", str(page), "-q"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"input 0: \d, [\d.]+ % sure, true class \d", said)
    assert "sufficient (others at mean)" in said
    assert "necessary (they at mean)" in said
    assert "NOT VERIFIED" not in said
    assert "causal nodes by ACE" in said
    text = page.read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)


def test_over_the_data_each_class_is_explained(digits, capsys):
    path, _ = digits
    assert main(["explain", "--recipe", str(path), "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["local"] is None
    assert {attribution["target"] for attribution in found["classes"]} <= set("0123456789")
    assert len(found["classes"]) >= 8
    assert found["causal_map"]["inputs"] == 16
    TypeAdapter(Explanation).validate_python(found)


def test_one_class_alone(digits, capsys):
    path, _ = digits
    assert main(["explain", "--recipe", str(path), "--class", "3", "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [attribution["target"] for attribution in found["classes"]] == ["3"]
    assert found["causal_map"]["scope"] == "class 3"


def test_a_file_is_explained_as_the_data_would_be(digits, explained, capsys, tmp_path):
    from PIL import Image

    path, recipe = digits
    data = load_data(recipe.data, seed=0)
    pixels = data.validation.show([5])[0][..., 0]
    Image.fromarray(pixels).save(tmp_path / "five.png")
    out = tmp_path / "five.json"
    given = ["explain", "--recipe", str(path), "--input", str(tmp_path / "five.png"), "--out", str(out), "-q"]
    assert main(given) == 0
    capsys.readouterr()
    local = json.loads(out.read_text())["explanations"][0]["local"]
    assert (local["index"], local["name"], local["true_class"]) == (None, "five.png", None)
    with torch.no_grad():
        logits = build_model(recipe.model)(data.validation.take([5])[0])
    assert local["decision"] == data.classes[int(logits.argmax())]
    assert local["confidence_pct"] == pytest.approx(100 * float(logits.softmax(1).max()), abs=2)


def test_a_table_is_explained_by_columns(tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    recipe = small_runs.table_recipe(weights, explain=SMALL)
    small_runs.train(recipe, weights, epochs=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert main(["explain", "--recipe", str(path), "--index", "1", "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    names = {feature["name"] for feature in found["local"]["output"][0]["features"]}
    assert "mean radius" in names
    assert found["grid"] is None
    assert found["local"]["output"][0]["baselines"] == ["mean"]  # nothing to blur
    row = tmp_path / "row.npy"
    np.save(row, load_data(recipe.data, seed=0).validation.take([1])[0].numpy())
    assert main(["explain", "--recipe", str(path), "--input", str(row), "--json", "-q"]) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert again["local"]["output"][0]["features"] == found["local"]["output"][0]["features"]


def test_a_run_shows_teacher_and_student(tmp_path, capsys):
    from causal_compress import compress

    weights = tmp_path / "w.safetensors"
    recipe = small_runs.digits_recipe(
        weights,
        distill=None,
        benchmark=None,
        explain=SMALL,
        intervene={"inputs": 64, "batch_size": 64},
        plan={"inputs": 64, "heldout": 32, "max_span": 1, "widths": [0.5]},
        budget={"macs": 0.8},
        rewrite={"inputs": 64},
        prune={"inputs": 64},
    )
    small_runs.train(recipe, weights, epochs=2)
    run = tmp_path / "run"
    compress(recipe, run)
    before = sorted(file.name for file in run.iterdir())
    assert main(["explain", str(run), "--index", "2", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["network"] for one in found] == ["teacher", "student"]
    assert sorted(file.name for file in run.iterdir()) == before
    assert main(["explain", str(run), "--arch", "x.py:y"]) == 2
    assert "a run brings its own network" in capsys.readouterr().err
    state = load_file(weights)
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, weights)
    assert main(["explain", str(run), "--index", "2", "-q"]) == 1
    assert "the teacher of" in capsys.readouterr().err
    save_file(state, weights)
    assert main(["explain", str(run), "--index", "2", "--set", "data.validation=99", "-q"]) == 1
    assert "the data of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--index", "100000"], "no input 100000"),
        (["--class", "cat"], "no class 'cat'"),
        (["--index", "1", "--input", "x.png"], "two inputs"),
        (["--out", "page.pdf"], "kind is unknown"),
        (["--input", "absent.png"], "can't be read as an input"),
    ],
)
def test_wrong_questions_are_refused(digits, capsys, given, said):
    path, _ = digits
    assert main(["explain", "--recipe", str(path), *given, "-q"]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "remedy:" in error


class Counting(HTMLParser):
    """Counts tags."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_the_page_escapes_names_and_shows_pictures(explained):
    found, x, data, recipe = explained
    text = explanation_page("<b>title</b>", [found], [pictures_of(found.local, x, data, recipe.explain)])
    parser = Counting()
    parser.feed(text)
    assert "script" not in parser.tags
    assert "&lt;script&gt;" in text
    assert "<b>title" not in text
    assert parser.tags.count("svg") >= 3
    assert text.count("data:image/png;base64,") >= 2
    assert parser.tags.count("table") >= 4


def test_sites_and_classes_of_one_input(explained):
    found = explained[0].local
    assert found.output[0].target == found.decision
    assert len(found.output) == 3
    assert len(found.nodes) == 1
    assert len(found.output[0].features) == 16
    assert found.sufficient.verified
    assert (found.causal_map.scope, found.causal_map.inputs) == ("one input", 1)


def test_without_skip_connections_the_map_is_of_units_and_says_so(explained, capsys):
    _, x, data, recipe = explained
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)]
    network = trace(nn.Sequential(nn.Flatten(), *layers), data.example_input)
    subject = Subject("chain", network, tuple((site,) for site in range(len(network.regions))))
    found = explain(subject, data, recipe.explain, Question(data.validation, x=x, name="one"), seed=0)
    assert found.causal_map.estimator == found.local.causal_map.estimator == "units"
    assert any("no skip connection" in note for note in found.notes)
    assert len({round(node.ace, 12) for node in found.causal_map.nodes}) == len(network.regions)
    show_explanation(found)
    assert "not taken apart: " in capsys.readouterr().out
    page = explanation_page("digits", [found], [None])
    assert "could not be taken apart" in page
    assert found.local.causal_map.skipped[0].reason in page


def test_with_skip_connections_the_map_stays_as_asked(explained):
    found = explained[0]
    assert found.causal_map.estimator == "output"
    assert not any("no skip connection" in note for note in found.notes)


def test_one_input_does_not_cost_every_class(explained):
    assert explained[0].classes == ()


def test_inputs_are_drawn_from_the_whole_split(explained):
    _, _, data, recipe = explained
    order = torch.argsort(data.validation.labels, stable=True)
    whole = data.validation
    ordered = replace(whole, labels=whole.labels[order], positions=whole.positions[order.numpy()])
    network = trace(build_model(recipe.model), data.example_input)
    section = recipe.explain.model_copy(update={"map_inputs": 24})
    asked = _Asked(open_engine(network), data, section, ("mean",), "units", 0)
    x = _decided(asked, Question(ordered, x=x_of(data)))[-1]
    assert len(x) == 24
    with torch.no_grad():
        assert len(build_model(recipe.model)(x).argmax(1).unique()) >= 5


def x_of(data):
    """Some input: classes are then not asked for."""
    return data.validation.take([0])[0]


def test_an_array_is_prepared_as_the_data_are(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", x=x, y=np.arange(40) % 2)
    data = load_data(DataSection(source=f"npz:{tmp_path / 'bytes.npz'}", calibration=8, validation=8), seed=0)
    wanted, _ = data.validation.take([5])
    pixels = data.validation.rows.store.read(data.validation.positions[[5]])[0]
    for values in (pixels.astype(np.float64), pixels.astype(np.int64), pixels[..., 0]):
        np.save(tmp_path / "one.npy", values)
        torch.testing.assert_close(read_input(tmp_path / "one.npy", data), wanted)
    for values in (np.array("abc"), np.zeros((2, 2, 2, 2)), np.full((8, 8), np.nan)):
        np.save(tmp_path / "one.npy", values)
        with pytest.raises(DataError):
            read_input(tmp_path / "one.npy", data)
    (tmp_path / "one.npy").write_bytes(b"")
    with pytest.raises(DataError, match="can't be read"):
        read_input(tmp_path / "one.npy", data)


def test_an_array_with_other_channels_is_refused(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x=x, y=np.arange(40) % 2)
    section = DataSection(source=f"npz:{tmp_path / 'grey.npz'}", calibration=8, validation=8, channels=3)
    data = load_data(section, seed=0)
    np.save(tmp_path / "one.npy", x[0])
    assert read_input(tmp_path / "one.npy", data).shape == (1, 3, 8, 8)
    np.save(tmp_path / "one.npy", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="other channels") as caught:
        read_input(tmp_path / "one.npy", data)
    assert (caught.value.found, caught.value.wanted[:12]) == ("3 channel(s)", "1 channel(s)")


def test_images_that_pillow_would_clip_or_cant_hold_are_refused(explained, tmp_path, monkeypatch):
    from PIL import Image

    data = explained[2]
    for name, pixels in (("deep.png", np.full((8, 8), 40_000, np.uint16)), ("float.tif", np.ones((8, 8), np.float32))):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(DataError, match="16-bit or float"):
            read_input(tmp_path / name, data)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # 8 x 8 is beyond twice of it
    with pytest.raises(DataError, match=r"huge\.png"):
        read_input(tmp_path / "huge.png", data)


def test_archives_under_an_arrays_name_are_refused(explained, tmp_path):
    np.savez(tmp_path / "several.npz", x=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "cut.npy").write_bytes(b"PK\x03\x04 and nothing more")
    for name in ("several.npy", "cut.npy"):
        with pytest.raises(DataError, match="can't be read as an input"):
            read_input(tmp_path / name, explained[2])


def test_a_row_with_holes_is_refused(tmp_path):
    data = load_data(small_runs.table_recipe(tmp_path / "w.safetensors").data, seed=0)
    np.save(tmp_path / "row.npy", np.full(30, np.nan))
    with pytest.raises(DataError, match="can't be read"):
        read_input(tmp_path / "row.npy", data)


def test_a_row_of_words_is_refused(tmp_path):
    data = load_data(small_runs.table_recipe(tmp_path / "w.safetensors").data, seed=0)
    np.save(tmp_path / "row.npy", np.array(["a", "b"]))
    with pytest.raises(DataError, match="can't be read"):
        read_input(tmp_path / "row.npy", data)


def test_pictures_show_the_donor_that_the_search_used(explained):
    found, x, data, recipe = explained
    marginal = recipe.explain.model_copy(update={"baselines": ["marginal"]})
    shown = pictures_of(found.local, x, data, marginal, seed=0)
    assert shown.sufficient != shown.original
    assert shown.sufficient == pictures_of(found.local, x, data, marginal, seed=0).sufficient


def test_what_has_no_interval_shows_a_dash(explained):
    _, x, data, recipe = explained
    network = trace(build_model(recipe.model), data.example_input)
    section = recipe.explain.model_copy(update={"estimator": "occlusion"})
    subject = Subject("network", network, (tuple(range(len(network.regions))),))
    told = explain(subject, data, section, Question(data.validation, x=x, name="one"), seed=0)
    assert np.isnan(told.local.output[0].features[0].low)
    assert any("no interval" in note for note in told.notes)
    page = explanation_page("digits", [told], [None])
    assert "nan" not in page.lower().replace("dominant", "")
    assert "<td>–</td>" in page
    show_explanation(told)


def test_a_run_takes_no_seed_not_even_zero(tmp_path, capsys):
    assert main(["explain", str(tmp_path), "--seed", "0"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_the_folder_of_out_is_made(digits, tmp_path, capsys):
    page = tmp_path / "new" / "page.json"
    assert main(["explain", "--recipe", str(digits[0]), "--class", "3", "--out", str(page), "-q"]) == 0
    capsys.readouterr()
    assert page.exists()
