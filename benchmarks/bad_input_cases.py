"""The inputs that `bad_inputs.py` gives the command line: each makes one thing wrong, and says what must come of it."""

from __future__ import annotations

import errno
import fcntl
import json
from typing import Any

import numpy as np
from bad_input_parts import (
    Case,
    Exploit,
    Place,
    compress,
    disk,
    flipped,
    state,
    state_with,
    whole_module,
    with_code,
    with_npz,
    with_recipe,
    with_saved,
    with_set,
    with_table,
    with_weights,
)


def _short_safetensors(place: Place) -> bytes:
    from safetensors.torch import save

    content: bytes = save(state())
    return content[: len(content) // 2]


def _images(**changed: float) -> Any:
    x = np.random.default_rng(0).random((60, 8, 8, 1), dtype=np.float32)
    x[7, 3, 3, 0] = changed["pixel"]
    return x


def _parquet(place: Place) -> list[str]:
    source = f"parquet:{place.write('table.parquet', b'PAR1 and so on')}"
    return compress("--data", source, "--set", "data.target=label")


def _broken_image(place: Place) -> list[str]:
    from PIL import Image

    for number in range(12):
        folder = place.folder / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    whole = (place.folder / "photos" / "class0" / "4.png").read_bytes()
    place.write("photos/class0/4.png", whole[:30])
    return compress("--data", "imagefolder:photos", "--set", "data.channels=1")


def _out_is_a_file(place: Place) -> list[str]:
    return compress(out=place.write("thesis.txt", "three years of work\n"))


def _out_is_foreign(place: Place) -> list[str]:
    (place.folder / "photos").mkdir()
    place.write("photos/wedding.jpg", b"\xff\xd8\xff")
    return compress(out="photos")


def _other_recipe(place: Place) -> list[str]:
    place.run()
    return compress("--set", "plan.align=4", "--set", "budget.macs=0.5")


def _busy(place: Place) -> list[str]:
    lock = (place.run() / ".lock").open("r+")
    place.undo.callback(lock.close)
    fcntl.flock(lock, fcntl.LOCK_EX)
    holder = {
        "pid": 4711,
        "host": "lab-3",
        "started": "2025-01-01T08:00:00+00:00",
        "command": "causal-compress compress",
    }
    lock.write(json.dumps(holder))
    lock.flush()
    return compress()


def _damaged_provenance(place: Place) -> list[str]:
    path = place.run() / "run.json"
    path.write_bytes(path.read_bytes()[:200])
    return compress()


def _deleted_stage(place: Place) -> list[str]:
    (place.run() / "export.json").unlink()
    return ["benchmark", "run"]


def _damaged_model(place: Place) -> list[str]:
    path = place.run() / "model.onnx"
    path.write_bytes(flipped(path.read_bytes()))
    return ["benchmark", "run"]


def _damaged_report(place: Place) -> list[str]:
    path = place.run() / "report.json"
    path.write_bytes(path.read_bytes()[:200])
    return ["report", "run"]


_NET = "import torch\nfrom torch import nn\n"
_FLAT = _NET + "def build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
_ROWS = "".join(f"{number},{number % 7},{'yes' if number % 2 else 'no'}\n" for number in range(40))
_TABLE = "age,size,label\n" + _ROWS

CASES: dict[str, tuple[Case, ...]] = {
    "Checkpoints": (
        Case("no such file", lambda _: compress("--weights", "techer.pt"), ("techer.pt", "no such file"), child=True),
        Case("a folder", lambda place: compress("--weights", "."), ("a folder",)),
        Case("0 bytes", with_weights("empty.pt", lambda _: b""), ("damaged", "0 bytes")),
        Case(
            "cut off in the middle",
            with_weights("cut.pt", lambda p: p.teacher()[: len(p.teacher()) // 2]),
            ("damaged", "end is missing"),
        ),
        Case("one flipped byte", with_weights("bad.pt", lambda p: flipped(p.teacher())), ("damaged", "checksum")),
        Case("safetensors, cut off", with_weights("cut.safetensors", _short_safetensors), ("damaged",)),
        Case(
            "a text file",
            with_weights("notes.txt", lambda _: b"remember to save the weights\n"),
            ("damaged", "not a checkpoint"),
        ),
        Case("a pickled whole module", with_saved(whole_module), ("pickled code", "state_dict"), child=True),
        Case("a pickle that runs a command", with_saved(Exploit), ("pickled code", "system"), child=True),
        Case("no state dict in it", with_saved(lambda: {"epoch": 3, "loss": 0.1}), ("no state dict", "epoch")),
        Case("of another architecture", with_saved(lambda: state(blocks=3)), ("do not fit", "unexpected", "blocks.2")),
        Case("for 7 classes", with_saved(lambda: state(num_classes=7)), ("wrong shape", "model.args.num_classes=7")),
        Case(
            "for images of 3 channels",
            with_saved(lambda: state_with("stem.0.weight", lambda w: w.repeat(1, 3, 1, 1))),
            ("wrong shape", "stem.0.weight"),
        ),
        Case(
            "NaN in it",
            with_saved(lambda: state_with("head.bias", lambda b: b * float("nan"))),
            ("finite", "head.bias"),
        ),
    ),
    "Architectures": (
        Case("unknown name", with_set("model.arch=torchvision:resnet81"), ("resnet81", "did you mean"), code=2),
        Case("FILE.py that is not there", with_set("model.arch=my_net.py:build"), ("my_net.py", "exist"), code=2),
        Case("FILE.py without that name", with_code(_NET + "def biuld(): ...\n"), ("build", "biuld"), code=2),
        Case("FILE.py with a syntax error", with_code("def build(:\n"), ("imported", "SyntaxError"), code=2),
        Case(
            "the callable raises",
            with_code(_NET + "def build():\n    raise KeyError('backbone')\n"),
            ("failed", "KeyError", "line 4"),
            code=2,
        ),
        Case("the callable returns no network", with_code("def build(): return 3\n"), ("int", "Module"), code=2),
        Case(
            "it would download weights",
            with_set("model.arch=torchvision:resnet18", "model.args={weights: DEFAULT}"),
            ("download",),
            code=2,
        ),
        Case(
            "timm is not installed",
            with_set("model.arch=timm:resnet18"),
            ("causal-compress[timm]",),
            absent=("timm",),
            child=True,
        ),
        Case(
            "returns a dict",
            with_code(_NET + "class build(nn.Module):\n    def forward(self, x): return {'logits': x}\n"),
            ("logits",),
        ),
        Case("made for another image size", with_code(_FLAT, "--set", "data.image_size=16"), ("can't be run", "16")),
        Case(
            "made for 1 channel, data of 3",
            with_set("data.channels=3", "data.normalize={}"),
            ("can't be run", "channels"),
        ),
        Case(
            "7 classes, data of 10",
            with_set("model.args={width: 8, blocks: 1, num_classes: 7}", "model.weights=null"),
            ("7 logits", "10 classes"),
        ),
    ),
    "Data": (
        Case("no such file", lambda _: compress("--data", "npz:dgits.npz"), ("dgits.npz", "not exist")),
        Case("unknown kind of source", lambda _: compress("--data", "digits.npz"), ("npz:digits.npz",), code=2),
        Case("unknown data set", lambda _: compress("--data", "sklearn:digit"), ("did you mean", "digits"), code=2),
        Case(
            "npz, cut off",
            lambda place: compress(
                "--data", place.npz()[:4] + place.write("cut.npz", (place.folder / "data.npz").read_bytes()[:900])
            ),
            ("cut.npz",),
        ),
        Case("npz with pickled objects", with_npz(y=np.array([{"label": 1}] * 60, dtype=object)), ("pickled",)),
        Case("npz without labels", with_npz(y=None), ("lacks arrays", "y_train")),
        Case("more images than labels", with_npz(y=np.arange(50) % 10), ("60 and 50",)),
        Case("labels with a gap", with_npz(y=np.arange(60) % 10 * 2), ("0..C-1",)),
        Case("labels below 0", with_npz(y=np.arange(60) % 10 - 1), ("0..C-1", "-1")),
        Case("labels that are no whole numbers", with_npz(y=np.arange(60) / 7), ("integer labels",)),
        Case("NaN in an image", with_npz(x=_images(pixel=float("nan"))), ("NaN",)),
        Case("one class only", with_npz(y=np.zeros(60, dtype=int)), ("fewer than 2 classes",)),
        Case("three images", with_npz(x=np.zeros((3, 8, 8, 1), np.uint8), y=np.arange(3)), ("too small",)),
        Case("a broken image file", _broken_image, ("4.png",)),
        Case("csv, unknown target column", with_table(_TABLE, "data.target=lable"), ("lable", "did you mean 'label'")),
        Case("csv, infinity in a cell", with_table(_TABLE + "inf,2,yes\n", "data.target=label"), ("infinity", "age")),
        Case("csv, a row without label", with_table(_TABLE + "3,2,\n", "data.target=label"), ("no label",)),
        Case("parquet without pyarrow", _parquet, ("causal-compress[parquet]",), absent=("pyarrow", "fastparquet")),
        Case(
            "normalisation of 3 channels for 1",
            with_set("data.normalize.mean=[0.5, 0.5, 0.5]"),
            ("3 numbers", "one per channel"),
        ),
        Case(
            "wrong normalisation: teacher near chance",
            with_set("data.normalize={mean: [40.0], std: [0.01]}"),
            ("near chance", "wrong preprocessing", "--force"),
            child=True,
        ),
    ),
    "Recipes": (
        Case("no such recipe", lambda _: compress(recipe="restnet"), ("restnet", "resnet"), code=2, child=True),
        Case("no such file", lambda _: compress(recipe="mine.yaml"), ("mine.yaml",), code=2),
        Case(
            "misspelt key",
            with_recipe(lambda text: text.replace("bootstraps", "bootstrap")),
            ("bad.yaml:13", "Did you mean"),
            code=2,
        ),
        Case("unknown section", with_recipe(lambda text: text + "quantise: {bits: 8}\n"), ("quantise",), code=2),
        Case(
            "out of range",
            with_recipe(lambda text: text.replace("macs: 0.7", "macs: 30")),
            ("bad.yaml:11", "budget.macs", "30"),
            code=2,
        ),
        Case("text for a number", with_set("distill={epochs: ten}"), ("distill.epochs", "ten"), code=2),
        Case(
            "six faults at once",
            with_set("seed=-1", "device=tpu", "plan.align=0", "group.epsilon=2", "threads=0.5", "plan.hights=1"),
            ("6 faults", "hights"),
            code=2,
        ),
        Case(
            "YAML tag that would run code",
            with_recipe(lambda text: text + "seed: !!python/object/apply:os.system ['touch PICKLE-WAS-RUN']\n"),
            ("tag", "not allowed"),
            code=2,
            child=True,
        ),
        Case("a key twice", with_recipe(lambda text: text + "threads: 2\n"), ("twice",), code=2),
        Case("indented by tabs", with_recipe(lambda text: text.replace("\n  ", "\n\t")), ("tabs",), code=2),
        Case(
            "aliases that grow without end",
            with_recipe(lambda text: text + "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
            ("alias",),
            code=2,
        ),
        Case("a picture", with_recipe(lambda _: b"\x89PNG\r\n\x1a\n\x00\x00"), ("UTF-8",), code=2),
        Case("--set without a value", with_set("distill.epochs"), ("section.key=value",), code=2),
        Case("no network and no data", lambda _: ["compress", "--out", "run"], ("model.arch",), code=2),
        Case("no --out", lambda _: ["compress", "--recipe", "recipe.yaml"], ("--out",), code=2),
    ),
    "Run folders": (
        Case("read-only disk", disk(errno.EROFS, "ro"), ("can't be written", "--out")),
        Case("full disk", disk(errno.ENOSPC, "size=4k"), ("no space left", "free some space")),
        Case(
            "disk that becomes full on the way",
            disk(errno.ENOSPC, "size=64k", after=8),
            ("no space left", "finished stages are kept"),
        ),
        Case("in /proc", lambda _: compress(out="/proc/run"), ("/proc/run",), child=True),
        Case("a file", _out_is_a_file, ("can't be a folder",)),
        Case("a folder of something else", _out_is_foreign, ("not a run folder", "wedding.jpg")),
        Case(
            "a folder of another recipe", _other_recipe, ("another recipe", "plan.align is 1 there, 4 now"), child=True
        ),
        Case("a busy folder", _busy, ("busy", "4711")),
        Case("run.json cut off", _damaged_provenance, ("run.json", "damaged", "JSON")),
        Case("a result deleted", _deleted_stage, ("export",)),
        Case("model.onnx damaged", _damaged_model, ("export", "damaged")),
        Case("report.json cut off", _damaged_report, ("report.json",)),
        Case("benchmark of no run", lambda _: ["benchmark", "."], ("not a run folder",)),
        Case("--reuse of no run", lambda _: compress("--reuse", "nowhere"), ("nowhere", "not a run folder")),
    ),
    "What can't be done": (
        Case("a budget that no plan meets", with_set("budget.macs=0.001"), ("budget",), code=3, child=True),
        Case("a device that is not there", with_set("device=cuda:7", "distill={epochs: 1}"), ("cuda:7",), child=True),
        Case(
            "distillation that diverges",
            with_set("distill={epochs: 2, learning_rate: 1.0e+30, batch_size: 64}"),
            ("distill", "finite", "learning_rate"),
        ),
        Case("every module excluded from change", with_set('plan.exclude=["*"]'), ("budget",), code=3),
    ),
}
