"""What tests of the harm audit share: a quick audit, answers written down, a student that is the teacher."""

from __future__ import annotations

import numpy as np

from causal_compress.explain.corruptions import Corruption, corruptions
from causal_compress.explain.paired import Answers, Pair, flips
from causal_compress.inputs.data import Data
from causal_compress.recipe import AuditSection
from causal_compress.results import Audit, Merge
from causal_compress.shrink.surgery import Student, assemble, copied
from causal_compress.understand.trace import Network

QUICK = AuditSection(corruption_inputs=60, attribution_inputs=16, masks=24, map_inputs=64, resamples=200, examples=3)


def answers_of(predicted: list[int]) -> Answers:
    n = len(predicted)
    return Answers(np.array(predicted), np.full(n, 0.9), np.full(n, 0.1), np.full(n, 0.2))


def pair_of(labels: list[int], teacher: list[int], student: list[int]) -> Pair:
    return Pair(np.array(labels), answers_of(teacher), answers_of(student), np.zeros(len(labels)))


def twin(network: Network) -> Student:
    """A student that is the teacher."""
    count = len(network.regions)
    return copied(assemble(network, [Merge(first=i, last=i, representative=i, adapter=None) for i in range(count)]))


def kinds_of(data: Data, seed: int = 0) -> dict[tuple[str, int], Corruption]:
    found = corruptions(data, data.validation, seed)
    assert isinstance(found, list)
    return {(kind.name, kind.severity): kind for kind in found}


def audit_of(pair: Pair) -> Audit:
    """An audit that looked at answers alone."""
    nothing = dict.fromkeys(("per_class", "quality", "corruptions", "gallery", "skipped"), ())
    absent = dict.fromkeys(("groups", "attribution", "causal_map"))
    told = {"overall": pair.compared(), "flips": flips(pair, ("a", "b"))}
    return Audit(split="validation", n=len(pair.labels), classes=1, seed=0, seconds=0.0, **told, **nothing, **absent)
