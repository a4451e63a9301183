"""causal-compress: makes a trained PyTorch classifier small and fast by understanding it."""

from __future__ import annotations

from typing import Any

__all__ = ["analyze", "compress", "load", "load_recipe", "replay"]

_HOMES = {
    "analyze": "causal_compress.pipeline",
    "compress": "causal_compress.pipeline",
    "load": "causal_compress.deploy.package",
    "load_recipe": "causal_compress.recipe_file",
    "replay": "causal_compress.afterwards",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'causal_compress' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
