"""Every knob: what one can ask for, with its default, its unit and its range.

A recipe is one YAML file of sections. Unknown keys are refused with a "did you mean"; all faults are reported at once,
each with file and line. `--set section.key=value` overrides a key. `recipe_file.py` reads and writes the file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
RuntimeName = Literal[
    "torch",
    "torch-compiled",
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
]


def _multiple(named: Any) -> Any:
    """A target's name -> the multiple of channels that its kernels are built for; anything else as it is."""
    if named == "cpu":
        import torch

        return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    return {"tensor-cores": 8, "int8": 16}.get(named, named) if isinstance(named, str) else named


Multiple = Annotated[
    int,
    BeforeValidator(_multiple),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"enum": ["cpu", "int8", "tensor-cores"]}]}),
]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """The teacher: which architecture, which weights."""

    arch: str | None = Field(
        None, description="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the architecture")
    weights: str | None = Field(None, description=".pt, .pth, .th or .safetensors file; null: the callable's own")


class NormalizeSection(Section):
    """Normalisation of inputs that were scaled to [0, 1] (images) or that are raw columns (tables)."""

    mean: list[float] | None = Field(None, description="one number per channel; null: none (images), fitted (tables)")
    std: list[Annotated[float, Field(gt=0)]] | None = Field(None, description="one number per channel")


class AugmentSection(Section):
    """Augmentation of training images."""

    crop_padding: NonNegative = Field(0, description="random crop after zero-padding by so many pixels")
    horizontal_flip: bool = False
    rotation: float = Field(0.0, ge=0, le=180, description="random rotation by up to so many degrees, both ways")
    zoom: float = Field(1.0, ge=1, le=4, description="random enlargement or reduction by up to this factor")


class DataSection(Section):
    """Where the data is and how it is read."""

    source: str | None = Field(
        None,
        description="npz:FILE, imagefolder:DIR, torchvision:NAME:ROOT, csv:FILE, parquet:FILE, sklearn:NAME "
        "or FILE.py:CALLABLE",
    )
    test_source: str | None = Field(None, description="csv and parquet only: a second file that is the test split")
    normalize: NormalizeSection = NormalizeSection()
    augment: AugmentSection = AugmentSection()
    image_size: Positive | None = Field(None, description="images are resized to this many pixels, both sides")
    channels: Positive | None = Field(None, description="repeat a grey image to so many channels")
    calibration: Positive = Field(2048, description="inputs held out of training for interventions and refits")
    validation: Positive = Field(2000, description="inputs held out of training for every choice")
    validation_from: Literal["train", "test"] = Field(
        "train", description="test: part of the source's own test split, for a teacher that has seen all training data"
    )
    test_share: Share = Field(0.2, description="share held out as test split where the source has none")
    max_train: Positive | None = Field(None, description="use at most so many training inputs")
    max_test: Positive | None = Field(None, description="use at most so many test inputs")
    target: str | int | None = Field(None, description="tables: name (or number, without a header) of the label column")
    target_groups: dict[str, list[str | int] | Literal["*"]] | None = Field(
        None, description='tables: class name -> labels that belong to it; "*" takes all others'
    )
    categorical: list[str | int] | None = Field(
        None, description="tables: columns to one-hot encode; null: guess from dtype"
    )
    drop: list[str | int] = Field(default_factory=list, description="tables: columns that are not inputs")
    header: bool = Field(True, description="tables: whether the first line names the columns")


class InterveneSection(Section):
    """do(X = x'): which features are masked, and what they become."""

    inputs: Positive = Field(2048, description="calibration inputs that are observed")
    baselines: list[Literal["zero", "mean", "blur", "marginal"]] = Field(["mean", "marginal"], min_length=1)
    grid: Positive = Field(4, description="images: patches per side")
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.25, description="share of features masked at a time")
    masks: Positive = Field(2, description="masks drawn per input and baseline")
    batch_size: Annotated[int, Field(ge=8)] = 256


class GroupSection(Section):
    """Causal nodes: neighbouring sites whose activations are equivalent."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="null: chosen by persistence")
    bootstraps: NonNegative = Field(50, description="resamples for the stability of the partition")


class PlanSection(Section):
    """Which regions merge and which channels go."""

    depth: bool = Field(True, description="merge neighbouring regions")
    width: bool = Field(True, description="remove channels")
    low_rank: bool = Field(True, description="split layers into two thinner ones")
    max_span: Positive = Field(3, description="regions that one representative may stand for")
    borrow: bool = Field(True, description="a representative may have inner channels of the regions it stands for")
    max_epsilon: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="only spans with CKA >= 1 - this are tried"
    )
    inputs: Positive = Field(512, description="calibration inputs for the candidates' normal equations")
    heldout: Positive = Field(
        256, description="calibration inputs on which candidates are scored, plain and intervened"
    )
    widths: list[Share] = Field([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], description="shares of channels tried")
    rank_errors: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.02, 0.05, 0.1, 0.15, 0.2, 0.3], description="shares of a layer's output variance that a low rank may lose"
    )
    align: Multiple = Field(
        1,
        description="channel counts are multiples of this; `cpu`, `int8` and `tensor-cores` stand for the numbers that "
        "suit this CPU's vectors (16 with AVX-512), INT8 kernels (16) and tensor cores (8)",
    )
    min_channels: Positive = Field(4, description="never fewer channels than this in a group")
    temperature: Annotated[float, Field(gt=0)] = Field(4.0, description="softmax temperature of the output KL")
    include: list[str] = Field(["*"], description="patterns of names of modules that may change, with all inside them")
    exclude: list[str] = Field(
        default_factory=list, description="patterns of names of modules that keep their outputs, likewise"
    )
    undo: list[str] = Field(
        default_factory=list, description="nodes that stay whole, named as in the ledger: a region, or FIRST..LAST"
    )


class RewriteSection(Section):
    """Merged regions: one representative kept and refitted."""

    inputs: Positive = Field(2048, description="calibration inputs for the closed-form refits")
    penalties: list[Annotated[float, Field(gt=0)]] = Field(
        [1e-4, 1e-3, 1e-2, 1e-1], min_length=1, description="ridge penalties tried, relative to the mean squared input"
    )


class PruneSection(Section):
    """Channels removed and their consumers refitted."""

    inputs: Positive = Field(2048, description="calibration inputs for the closed-form repairs")
    penalties: list[Annotated[float, Field(gt=0)]] = Field([1e-4, 1e-3, 1e-2, 1e-1], min_length=1)
    bn_reestimate: Literal["auto", "always", "never"] = Field("auto", description="auto: kept where held-out KL falls")
    head_refit: Literal["auto", "always", "never"] = Field("auto", description="of the classifier, on its new features")
    refine: Literal["auto"] | bool = Field(
        "auto", description="Gauss-Newton steps on all layers of a part together; auto: if inputs are fewer than 1,024"
    )


class DistillSection(Section):
    """Recovery: the student learns from the teacher."""

    epochs: NonNegative = 10
    batch_size: Positive = 128
    optimizer: Literal["muon", "sgd"] = Field("muon", description="of weight matrices; the rest has SGD in any case")
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.02, description="peak of SGD; the student is near already")
    relative_rate: Annotated[float, Field(gt=0, lt=1)] = Field(0.004, description="peak of muon: step / weights' norm")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="of the weights that SGD trains")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        5.0, description="longer gradients are shortened to this norm; networks without batch norm need it; null: never"
    )
    temperature: Annotated[float, Field(gt=0)] = 4.0
    label_weight: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="of the label loss; the rest is KD")
    boundary_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the boundary loss, in the first third")
    intervened_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of each batch that is intervened"
    )
    intervened_fractions: list[Share] = Field([0.25], min_length=1, description="shares of features masked, in turn")
    norms: bool = Field(False, description="batch norms where there are none while it trains; folded afterwards")
    views: Positive | None = Field(None, description="augmented views of each input, taught once; null: ever new ones")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay of the averaged weights; 0 switches it off"
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile; auto: in long runs on CPUs with a C++ compiler; on a GPU, CUDA graphs"
    )


class ExportSection(Section):
    """ONNX file and its parity with PyTorch."""

    opset: Annotated[int, Field(ge=18)] = 18
    max_abs_diff: Annotated[float, Field(gt=0)] = 1e-3
    min_agreement_pct: Annotated[float, Field(ge=0, le=100)] = 99.9
    inputs: Positive = Field(512, description="validation inputs on which parity is checked")


class BenchmarkSection(Section):
    """What is measured on which runtime."""

    runtimes: list[RuntimeName] = Field(["torch", "onnxruntime"], min_length=1)
    batches: list[Positive] = Field([1, 64], min_length=1)
    threads: list[Positive] = Field([1], min_length=1)
    repeats: Positive = Field(
        100, description="timed calls of each model, interleaved; at large batches fewer, see seconds"
    )
    seconds: Annotated[float, Field(gt=0)] = Field(5.0, description="time limit for each row")


class LatencySection(Section):
    """Latency on one runtime, as it will be measured at the end."""

    runtime: Literal["onnxruntime"] = "onnxruntime"
    batch: Positive = 1
    threads: Positive = 1
    keep: Share = Field(description="largest share of the teacher's latency; 10th percentiles, of undisturbed calls")


class BudgetSection(Section):
    """What the result must satisfy."""

    macs: Share | None = Field(None, description="largest share of the teacher's MACs")
    params: Share | None = Field(None, description="largest share of the teacher's parameters")
    size_bytes: Positive | None = Field(None, description="largest ONNX file (with `quantize` the INT8 one) [bytes]")
    latency_ms: LatencySection | None = Field(None, description="largest share of the teacher's latency on a runtime")
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = Field(None, description="largest drop of accuracy [pp]")


class SearchSection(Section):
    """The search for the smallest network where the budget limits the drop of accuracy and no cost."""

    points: Positive = Field(5, description="shares of MACs that are recovered briefly at most")
    epochs: NonNegative = Field(2, description="of distillation at each; the first that fails, and the chosen, get all")
    full: Positive = Field(2, description="sizes recovered in full while the limit is looked for; the chosen always is")
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Field(0.5, description="that it holds; 0.975: half are PASS")


class ReportSection(Section):
    """The report."""

    title: str | None = None
    examples: NonNegative = Field(12, description="inputs shown on which teacher and student disagree")


class CounterfactualSection(Section):
    """Counterfactuals: the conditional GAN that makes them, and what it may change."""

    steps: Positive = Field(4000, description="training steps of generator and critic")
    batch_size: Annotated[int, Field(ge=8)] = 64
    width: Positive = Field(32, description="channels after the first layer (images); an eighth of the units (tables)")
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    adversarial_weight: Annotated[float, Field(ge=0)] = 1.0
    class_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="target class under the critic's own classifier, which keeps the network from being fooled"
    )
    target_weight: Annotated[float, Field(gt=0)] = Field(1.0, description="target class under the network explained")
    proximity_weight: Annotated[float, Field(ge=0)] = Field(
        4.0, description="mean absolute change, in pixel ranges or standard deviations"
    )
    perceptual_weight: Annotated[float, Field(ge=0)] = Field(
        0.2, description="relative change of the activation at the perceptual site"
    )
    cycle_weight: Annotated[float, Field(ge=0)] = Field(4.0, description="back to the first class gives the input back")
    perceptual_site: str | None = Field(None, description="a region's name; null: the one a third down the chain")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95, description="probability of the target beyond which nothing more is asked"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.995, description="decay of the generator's averaged weights")
    refine_steps: NonNegative = Field(12, description="gradient steps for inputs that the generator alone doesn't turn")
    checks: Positive = Field(8, description="times that training is watched on validation inputs")
    immutable: list[str] = Field(default_factory=list, description="tables: columns that never change")
    rises: list[str] = Field(default_factory=list, description="tables: numeric columns that may only rise")
    falls: list[str] = Field(default_factory=list, description="tables: numeric columns that may only fall")
    ranges: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="tables: lowest and highest raw value; default: training rows but the outermost 0.2 %",
    )
    watch: list[str] = Field(default_factory=list, description="features that must not decide; the bias probe warns")
    grid: Positive = Field(4, description="images: patches per side, the features of the bias probe")
    probe: Positive = Field(500, description="validation inputs for the bias probe")


class AuditSection(Section):
    """Teacher against student: what compression harmed."""

    split: Literal["validation", "test"] = "validation"
    inputs: Positive | None = Field(None, description="inputs that are audited; null: the whole split")
    batch_size: Positive = 250
    groups: str | None = Field(
        None, description="gaps over a table's column, `class`, or FILE.py:CALLABLE that names each row's group"
    )
    corruption_inputs: NonNegative = Field(1000, description="inputs that are corrupted; 0: none")
    attribution_inputs: NonNegative = Field(64, description="inputs whose attributions are compared; 0: none")
    masks: Positive = Field(128, description="masks for the attributions of one input")
    grid: Positive = Field(4, description="images: patches per side of the attributions")
    baseline: Literal["zero", "mean", "blur", "marginal"] = "mean"
    map_inputs: NonNegative = Field(512, description="inputs for the causal effect at each node; 0: no map")
    resamples: Positive = Field(1000, description="bootstrap resamples of the paired intervals")
    examples: NonNegative = Field(12, description="inputs shown on which teacher and student part")


class ExplainSection(Section):
    """Attributions, minimal sets and the causal map."""

    estimator: Literal["surrogate", "difference", "occlusion"] = Field(
        "surrogate", description="how effects of features are estimated from masks"
    )
    map_estimator: Literal["output", "units"] = Field(
        "output", description="effect of a node: on the network's answer, or on the node's own units as in the paper"
    )
    baselines: list[Literal["zero", "mean", "blur", "marginal"]] = Field(
        ["mean", "blur"], min_length=1, description="what masked features become; the first serves the minimal sets"
    )
    grid: Positive = Field(8, description="images: patches per side")
    masks: Annotated[int, Field(ge=16)] = Field(512, description="masks of an input that is explained")
    bootstraps: Annotated[int, Field(ge=20)] = Field(200, description="resamples of the masks, for intervals and nulls")
    map_baselines: list[Literal["zero", "mean", "blur", "marginal"]] = Field(
        ["marginal"], min_length=1, description="what masked features become for the causal map"
    )
    map_inputs: Annotated[int, Field(ge=2)] = Field(256, description="inputs over which the causal map is drawn")
    map_masks: Positive = Field(4, description="interventions of each of them")
    class_inputs: Annotated[int, Field(ge=2)] = Field(16, description="inputs of each class over which it is explained")
    class_masks: Annotated[int, Field(ge=16)] = Field(128, description="masks of each of them")
    batch_size: Positive = Field(64, description="inputs run at a time; more for a GPU")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of attributions; what decides (minimal sets, ablations, the map) is always fp32"
    )


class QuantizeSection(Section):
    """INT8 forms of the student's ONNX file."""

    families: list[Literal["cpu", "tensorrt"]] = Field(
        ["cpu", "tensorrt"], min_length=1, description="one file each: ONNX Runtime and OpenVINO; TensorRT"
    )
    inputs: Positive = Field(512, description="calibration inputs, plain, from which ranges and bias shifts are read")
    methods: list[Literal["minmax", "percentile", "entropy"]] = Field(
        ["minmax", "percentile", "entropy"], min_length=1, description="ranges tried; least output KL is taken"
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(99.99, description="share of values not clipped [%]")
    scored: Positive = Field(512, description="validation inputs on which output KL is read")
    temperature: Annotated[float, Field(gt=0)] = Field(4.0, description="softmax temperature of the output KL")
    max_accuracy_drop: Annotated[float, Field(ge=0)] = Field(
        0.3, description="largest drop against the FP32 student on all of validation [pp]; layers stay FP32 for it"
    )
    bias_correction: Literal["auto", "never"] = Field("auto", description="auto: kept only where output KL falls")
    reduce_range: Literal["auto"] | bool = Field("auto", description="7-bit weights; auto: if 8 overflow on this CPU")
    batch: Positive = Field(1, description="batch size at which INT8 and FP32 are timed")
    repeats: Positive = Field(100, description="timed calls of each, interleaved")
    seconds: Annotated[float, Field(gt=0)] = Field(5.0, description="time limit for each")


class Recipe(Section):
    """All that a run needs; sections set to null are skipped where that makes sense."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    budget: BudgetSection = BudgetSection()
    intervene: InterveneSection = InterveneSection()
    group: GroupSection = GroupSection()
    plan: PlanSection = PlanSection()
    rewrite: RewriteSection = RewriteSection()
    prune: PruneSection = PruneSection()
    distill: DistillSection | None = DistillSection()
    export: ExportSection = ExportSection()
    benchmark: BenchmarkSection | None = BenchmarkSection()
    report: ReportSection = ReportSection()
    search: SearchSection = SearchSection()
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: Positive | None = Field(None, description="CPU threads for the compression; null: one per core it may use")
    counterfactual: CounterfactualSection | None = None
    audit: AuditSection | None = Field(None, description="null: audited only by the command `audit`")
    explain: ExplainSection = ExplainSection()
    quantize: QuantizeSection | None = Field(None, description="null: no INT8 files")
