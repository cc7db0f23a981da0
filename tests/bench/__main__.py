"""`python -m tests.bench JOB [KEY=VALUE ...] [--only NAME] [--json]`"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gowide_dist import load_recipe
from gowide_dist.bench import machine
from tests.bench.measure import FIGURES, choose, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Each way of working against the plain one, in turns in one run, as ratios: the median of N pairs "
        "between their quartiles. Networks, batch size and images are the recipe's, the weights random.",
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--only", action="append", default=[], choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    recipe = load_recipe(given.job, given.overrides)
    results: dict[str, Any] = {"machine": machine()}
    if not given.json:
        print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    for name, result in measure(recipe, choose(recipe, given.only)):
        results[name] = result
        if not given.json:
            print(as_text(name, result), flush=True)
    if given.json:
        print(json.dumps(results, indent=2))


def as_text(name: str, result: Mapping[str, Any]) -> str:
    spread = f"{result['ratio']:.4g}  ({result['low']:.4g} to {result['high']:.4g} in {result['pairs']} pairs)"
    lines = [f"{name}  {spread}  target: {result['target']}", f"  {result['what']}"]
    for key, value in result.items():
        if key not in ("ratio", "low", "high", "pairs", "what", "target"):
            parts = [f"{part} {number}" for part, number in value.items()] if isinstance(value, dict) else [str(value)]
            lines.append(f"  {key:30}{', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
