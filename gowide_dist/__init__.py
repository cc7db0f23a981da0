"""Deep thin image classifiers, trained by going wide, then narrow (Zhou et al., ICML 2020, arXiv 2007.00811)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gowide_dist.networks.build import build_network
    from gowide_dist.networks.network import Network
    from gowide_dist.pipeline import load_model
    from gowide_dist.recipe import Recipe, load_recipe

__all__ = ["Network", "Recipe", "build_network", "load_model", "load_recipe"]

_HOMES = {"Recipe": "recipe", "load_recipe": "recipe", "Network": "networks.network",
          "build_network": "networks.build", "load_model": "pipeline"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: a login node reads recipes without paying for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gowide_dist")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gowide_dist.{_HOMES[name]}"), name)
