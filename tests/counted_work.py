"""A stage's work that counts its calls, a run that does it, and what then lies in the run's folder."""

from causal_compress.recipe import Recipe
from causal_compress.results import Skip
from causal_compress.runs import open_run

RECIPE = Recipe()
RESULT = Skip(what="conv1", reason="protected")


def opened(folder, recipe=RECIPE, **options):
    return open_run(folder, recipe, command=["causal-compress", "compress"], **options)


class Work:
    """A stage's work that counts its calls and leaves a weights file."""

    def __init__(self, result=RESULT, content=b"weights"):
        self.result, self.content, self.calls = result, content, 0

    def __call__(self, scratch):
        assert list(scratch.iterdir()) == []
        self.calls += 1
        (scratch / "rewrite.safetensors").write_bytes(self.content)
        return self.result


def run_once(folder, work, depends=None, **options):
    with opened(folder, **options) as run:
        return run.stage("rewrite", Skip, work, depends=depends or {"data": "d1"})


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
