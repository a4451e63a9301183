"""Every error that a user can meet.

CausalCompressError              exit 1
├── UsageError                   exit 2   the command line was used wrongly
│   └── RecipeError              exit 2   all faults of a recipe at once, each with file:line
├── CheckpointError              exit 1   weights that can't be read or don't fit the architecture
├── DataError                    exit 1   data that can't be read, is empty, holds NaN or has the wrong shape
├── TeacherError                 exit 1   the teacher is not better than chance: wrong preprocessing?
├── TraceError                   exit 1   a network that can't be run or analysed at all
├── SurgeryError             exit 1   a smaller network that differs from what was measured
├── RunFolderError               exit 1   a busy, foreign, read-only, full or damaged run folder
├── NumericalError               exit 1   NaN or infinity where a number was wanted
├── ExportError                  exit 1   a model that can't be exported or differs after the export
├── MissingPackageError          exit 1   an optional package or device that isn't there
└── BudgetError                  exit 3   a budget that no plan can meet

A message says what went wrong, what was found, what was wanted, and what to do about it.
"""

from __future__ import annotations


class CausalCompressError(Exception):
    """Base of all errors that are the user's to mend; printed without a traceback.

    Args:
        what: What went wrong, in one sentence.
        found: What was met.
        wanted: What had been expected.
        remedy: What to do about it; every error has one.
    """

    exit_code = 1

    def __init__(self, what: str, *, found: str = "", wanted: str = "", remedy: str) -> None:
        self.what, self.found, self.wanted, self.remedy = what, found, wanted, remedy
        parts = [what]
        if found:
            parts.append(f"found: {found}")
        if wanted:
            parts.append(f"wanted: {wanted}")
        parts.append(f"remedy: {remedy}")
        super().__init__("\n  ".join(parts))


class UsageError(CausalCompressError):
    """The command line was used wrongly."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with faults; the message lists all of them with file and line."""


class CheckpointError(CausalCompressError):
    """Weights that can't be read, or that don't fit the architecture."""


class DataError(CausalCompressError):
    """Data that can't be read, or that the network can't use."""


class TeacherError(CausalCompressError):
    """A teacher whose accuracy is near chance."""


class TraceError(CausalCompressError):
    """A network that can't be run on the example input, or that offers nothing to analyse."""


class SurgeryError(CausalCompressError):
    """A smaller network that does not compute what was measured."""


class RunFolderError(CausalCompressError):
    """A run folder that can't be used."""


class NumericalError(CausalCompressError):
    """NaN or infinity where a finite number was wanted."""


class ExportError(CausalCompressError):
    """An exported model that is invalid or differs from the PyTorch model."""


class MissingPackageError(CausalCompressError):
    """An optional package or a device that the chosen option needs is absent."""


class BudgetError(CausalCompressError):
    """A budget that can't be met."""

    exit_code = 3
