"""Packs the recipes of the top folder into the wheel; all else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies ``recipes/**/*.yaml`` to ``lmcompress/recipes/library/`` of what is built.

    Copied, not linked: symbolic links do not survive on Windows. An editable install reads them where they are.
    """

    def run(self) -> None:
        """Builds the package, then adds its recipes."""
        super().run()
        if self.editable_mode:
            return
        for source in self._recipes():
            target = self._packed(source)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files of the build, recipes included.

        Args:
            include_bytecode: whether compiled files are listed too.
        """
        return [*super().get_outputs(include_bytecode), *(str(self._packed(source)) for source in self._recipes())]

    def _recipes(self) -> list[Path]:
        return sorted(Path("recipes").rglob("*.yaml"))

    def _packed(self, source: Path) -> Path:
        return Path(self.build_lib, "lmcompress", "recipes", "library", source.relative_to("recipes"))


setup(cmdclass={"build_py": BuildWithRecipes})
