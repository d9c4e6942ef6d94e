"""Where the values of the configuration are: the folder `conf/`."""

from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parents[1]
# An installed package has the folder inside, a clone beside
CONF = next(place / "conf" for place in (_PACKAGE, _PACKAGE.parent) if (place / "conf").is_dir())


def values_of(option: str) -> dict[str, Any]:
    """Return the values that an option's own file gives, by their keys in the group.

    Args:
        option: the group and the name, such as `judge/endpoint`.
    """
    values = yaml.safe_load((CONF / f"{option}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "defaults"}
