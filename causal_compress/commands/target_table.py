"""What `benchmark TARGET...` shows: a table for people, or CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING

from causal_compress.console import show_table, tell

if TYPE_CHECKING:
    from causal_compress.results import TargetRow, TargetTable

_HEADER = (
    "target",
    "runtime",
    "batch",
    "threads",
    "p50 [ms]",
    "p95 [ms]",
    "p99 [ms]",
    "inputs/s",
    "against the first",
    "accuracy",
    "drop [pp]",
    "as expected",
    "size",
    "memory",
    "load",
    "energy",
)


def show_targets(table: TargetTable) -> None:
    """Prints one row for each target, runtime, batch size and number of threads; then notes and the machine."""
    show_table(_HEADER, [_cells(row) for row in table.rows])
    tell(f"each runtime's first row ({table.reference} where it runs there) is what the others on it are compared with")
    for note in table.notes:
        tell(f"  {note}")
    for skip in table.skipped:
        tell(f"  not measured: {skip.what}: {skip.reason}")
    tell(f"on: {'; '.join(table.runtimes)}; {table.machine['cpu']}, {table.machine['cores']} cores")


def targets_csv(table: TargetTable) -> str:
    """One line per row with the columns of TargetRow; intervals and accuracies as several columns."""
    lines = [_flat(row) for row in table.rows]
    text = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: TargetRow) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in dataclasses.asdict(row).items():
        if isinstance(value, tuple):
            flat[f"{name}_low"], flat[f"{name}_high"] = value
        elif isinstance(value, dict):
            flat |= {f"{name}_{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _cells(row: TargetRow) -> tuple[str, ...]:
    low, high = row.ratio_ci
    compared = (
        row.verdict if row.verdict == "reference" else f"{row.verdict}: {row.ratio:.2f}x ({low:.2f} to {high:.2f})"
    )
    accuracy = "" if row.accuracy is None else f"{row.accuracy.pct:.2f} % of {row.accuracy.n}"
    drop = ""
    if row.drop_pp is not None and row.drop_ci_pp is not None:
        drop = f"{row.drop_pp:.2f} ({row.drop_ci_pp[0]:.2f} to {row.drop_ci_pp[1]:.2f})"
    spread = f"{row.latency_ms_p50:.3g} ({row.p50_ci_ms[0]:.3g} to {row.p50_ci_ms[1]:.3g})"
    return (
        row.target,
        f"{row.runtime} {row.precision}",
        str(row.batch),
        str(row.threads),
        spread + ("" if row.device_ms is None else f", GPU {row.device_ms:.3g}"),
        f"{row.latency_ms_p95:.3g}",
        f"{row.latency_ms_p99:.3g}",
        f"{row.throughput_per_s:,.0f}",
        compared,
        accuracy,
        drop,
        "" if row.agreement_pct is None else f"{row.agreement_pct:.2f} %",
        f"{row.size_bytes / 1e6:.2f} MB",
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f} MB",
        f"{row.load_ms:.0f} ms",
        "" if row.energy_mj is None else f"{row.energy_mj:.3g} mJ",
    )
