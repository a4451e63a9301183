"""Peak memory of one model on one runtime, measured in a process of its own.

`main` is called with RUNTIME FILE THREADS SHAPE BATCHES; it writes JSON to standard output.
The rise counts from after the runtime is imported: the file's weights, the runtime's own copies, and activations.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import causal_compress.deploy.runtimes as runtimes
from causal_compress.deploy.runtimes import RuntimeName

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# The empty entry is the working folder, whose files may have names of standard modules; Python 3.10 has no -P.
_CODE = "import sys; sys.path[:] = filter(None, sys.path); from causal_compress.deploy.memory import main; "
_CODE += "main(sys.argv[1:])"


def peak_memory(
    name: RuntimeName, path: Path, input_shape: tuple[int, ...], batches: tuple[int, ...], *, threads: int
) -> dict[int, int] | None:
    """Rise of a fresh process's resident memory by loading a model and running one batch [bytes], per batch size.

    Args:
        name: Which runtime.
        path: The file that it loads.
        input_shape: Shape of one input.
        batches: Batch sizes.
        threads: Threads inside an operator.

    Returns:
        Batch size -> bytes; None if the process failed (for example for want of memory).

    Limits: resident memory in pages; allocators keep reserves, so differences below a megabyte mean nothing.
    """
    command = [sys.executable, "-c", _CODE, name, str(path.resolve()), str(threads)]
    command += [json.dumps(input_shape), json.dumps(sorted(batches))]
    package_folder = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        return {int(batch): int(rise) for batch, rise in json.loads(done.stdout.splitlines()[-1]).items()}
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None


def main(arguments: list[str]) -> None:
    """Measure in this process; it must have done nothing else.

    Args:
        arguments: Runtime, file, threads, shape of one input (JSON), batch sizes in rising order (JSON).
    """
    name, path, threads, shape, batches = arguments
    _import(name)
    before = _reset_peak()
    known = next(known for known in runtimes.RUNTIMES if known == name)
    runtime = runtimes.open_runtime(known, Path(path), threads=int(threads))
    rises = {}
    for batch in json.loads(batches):
        runtime.run(np.zeros((batch, *json.loads(shape)), dtype=np.float32))
        rises[batch] = max(0, _peak() - before)
    sys.stdout.write(json.dumps(rises) + "\n")


def _import(name: str) -> None:
    if name.startswith("torch"):
        # What `load` imports on its way counts as the runtime, not as the model.
        import torch._dynamo
        import torch.export.pt2_archive  # noqa: F401

        import causal_compress.deploy.package
    elif name == "openvino":
        import openvino  # noqa: F401

        import causal_compress.deploy.openvino  # noqa: F401
    else:
        import onnxruntime  # noqa: F401


def _reset_peak() -> int:
    """Resident memory now [bytes]; the peak starts from here where the system allows it."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    return _peak()


def _peak() -> int:
    """Highest resident memory so far [bytes]; on systems without /proc the present one."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)
