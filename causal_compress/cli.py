"""The command line: every outcome becomes an exit code. The commands themselves are in `commands/`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from causal_compress.commands import about, auditing, compressing, counterfactual, deploying, explaining, finished
from causal_compress.console import complain, confess, tell
from causal_compress.errors import CausalCompressError
from causal_compress.runfolder import UNUSABLE, folder_error


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns every outcome into an exit code.

    Args:
        args: The arguments without the program's name; None: those of this process.

    Returns:
        0 PASS or done, 1 error, 2 wrong usage or recipe, 3 budget missed, 4 inconclusive, 130 interrupted.
    """
    # Threads of torch that wait by spinning slow each other down many times over once another process wants the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with ExitStack() as stack:  # closed after the error is printed, so that -v still counts then
        try:
            return cli.main(args, prog_name="causal-compress", standalone_mode=False, obj=stack) or 0
        except click.ClickException as error:
            error.show()
            if re.search(r"extra argument.*\(['\"]?[a-z_]+(\.[a-z_]+)*=", error.message):
                click.echo("--set takes one key: write --set before each.", err=True)
            return error.exit_code
        except (click.Abort, KeyboardInterrupt) as stop:
            return _interrupted(stop, resumes=_resumes(args))
        except CausalCompressError as error:
            return complain(error)
        except Exception as error:
            return _unexpected(error, resumes=_resumes(args))


def _resumes(args: Sequence[str] | None) -> bool:
    """Whether the command keeps finished stages in a run folder; the group's own options end at once."""
    return next(iter(sys.argv[1:] if args is None else args), None) in ("compress", "analyze", "demo")


def _interrupted(stop: BaseException, *, resumes: bool) -> int:
    if isinstance(stop.__cause__, EOFError):  # click takes a truncated file for the end of typed input
        return confess(stop.__cause__, resumes=resumes)
    then = "goes on after the last finished stage" if resumes else "starts from the beginning"
    click.echo(f"interrupted; the same command {then}", err=True)
    return 130


def _unexpected(error: Exception, *, resumes: bool) -> int:
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return complain(folder_error(Path(error.filename or "the output"), error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = "memory ran out"
        remedy = (
            "lower intervene.batch_size, the stages' `inputs` or distill.batch_size with --set, or use another device"
        )
        return complain(CausalCompressError(what, found=str(error), remedy=remedy))
    return confess(error, resumes=resumes)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=lambda *given: _show_version(*given)
)
def cli() -> None:
    """Makes a trained PyTorch classifier smaller and faster by understanding it first.

    Exit codes: 0 PASS, 1 error, 2 wrong usage or recipe, 3 budget missed, 4 inconclusive, 130 interrupted.
    """


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from causal_compress.provenance import package_version

        tell(f"causal-compress {package_version()}")
        context.exit()


for _command in (
    compressing.compress,
    compressing.analyze,
    compressing.demo,
    finished.benchmark,
    finished.report,
    deploying.export,
    deploying.gate,
    explaining.explain,
    auditing.audit,
    auditing.bisect,
    counterfactual.counterfactual,
    about.doctor,
    about.recipes,
):
    cli.add_command(_command)
