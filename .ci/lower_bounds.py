"""Print the lowest version of each package that pyproject.toml declares, as constraints for pip."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def lowest() -> Iterator[str]:
    """Yield the lowest declared version of each package that every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for each in map(Requirement, project["dependencies"]):
        (version,) = (one.version for one in each.specifier if one.operator in (">=", "=="))
        yield f"{each.name}=={version}"


if __name__ == "__main__":
    print("\n".join(lowest()))
