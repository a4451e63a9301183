"""Ours beside its peers: students at equal MACs, data and recovery, of ResNet-20 on CIFAR-10 (or --arch).

    python benchmarks/peers.py --weights resnet20-12fca82f.th --data cifar10.npz --work runs/peers
    python benchmarks/peers.py --weights ... --data ... --work runs/peers --epochs 15 --seeds 0 1 2

Peers: Torch-Pruning (inner channels, ranked over the whole network) by L1 group norm, Taylor, batch norm scale and
random importance; blocks replaced by identity in the order of CKA; the L1 student's architecture from new weights. How
students recover and are read is said in equal_cost.py. Writes results/peers.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from equal_cost import SCRATCH, Case, Method, Pairs, ours, out_of_reach, run
from torch import nn

from causal_compress.inputs.models import build_model

TAYLOR_INPUTS = 512


def torch_pruning(case: Case, importance: Callable[[], Any]) -> tuple[nn.Module, Pairs]:
    """Torch-Pruning to the cost asked for: the first convolution of each block loses channels, ranked globally."""
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(12):
        ratio = (low + high) / 2
        pruned = _pruned(case, importance(), ratio)
        if case.cost(pruned) <= case.limit:
            best, high = pruned, ratio
        else:
            low = ratio
    if best is None:
        raise out_of_reach(case, "Torch-Pruning's largest ratio")
    return best, []


def _pruned(case: Case, importance: Any, ratio: float) -> nn.Module:
    model = build_model(case.recipe.model, classes=len(case.data.classes)).eval()
    inner = {module for name, module in model.named_modules() if name.endswith(".conv1")}
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner]
    with torch.enable_grad():
        pruner = tp.pruner.BasePruner(
            model,
            case.data.example_input[:1],
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=others,
        )
        if isinstance(importance, tp.importance.GroupTaylorImportance):
            for x, y in case.data.calibration.batches(128, limit=TAYLOR_INPUTS):
                F.cross_entropy(model(x), y).backward()
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def identities(case: Case) -> tuple[nn.Module, Pairs]:
    """Blocks whose input and output are most alike become identities until the cost is reached."""
    model = build_model(case.recipe.model, classes=len(case.data.classes)).eval()
    regions = case.network.chain().regions
    alike = sorted(
        (index for index, region in enumerate(regions) if index and region.input_shape == region.output_shape),
        key=lambda index: -case.effects.cka[index - 1][index],
    )
    for index in alike:
        if case.cost(model) <= case.limit:
            break
        block = regions[index].modules[0].rpartition(".")[0]
        model.set_submodule(block, nn.Identity())
    if case.cost(model) > case.limit:
        raise out_of_reach(case, "identities for all blocks that keep their shape")
    return model, []


def from_scratch(case: Case) -> tuple[nn.Module, Pairs]:
    """The L1 student's architecture with new weights."""
    model, _ = torch_pruning(case, lambda: tp.importance.GroupMagnitudeImportance(p=1))
    torch.manual_seed(case.recipe.seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model, []


METHODS: dict[str, Method] = {
    "ours": ours,
    "Torch-Pruning, L1": lambda case: torch_pruning(case, lambda: tp.importance.GroupMagnitudeImportance(p=1)),
    "Torch-Pruning, Taylor": lambda case: torch_pruning(case, tp.importance.GroupTaylorImportance),
    "Torch-Pruning, batch norm scale": lambda case: torch_pruning(case, tp.importance.BNScaleImportance),
    "Torch-Pruning, random": lambda case: torch_pruning(case, tp.importance.RandomImportance),
    "identity in CKA order": identities,
    SCRATCH: from_scratch,
}

if __name__ == "__main__":
    run(METHODS, __doc__, "peers")
