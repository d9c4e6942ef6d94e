"""What pyproject.toml cannot say: an installed package has `conf/` inside, a clone has it beside.

Were `conf/` mapped to a package (`package-dir`), an editable installation would no longer put the
clone's root on Python's path, where benchmarks/ find tests/.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Builds the package, with `conf/` in it unless the installation is editable."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib, "orpo_lab", "conf"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConf})
