"""What pyproject.toml cannot say: data/ and notebooks/ stay at the top of the repository and travel in the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"data": "**/*", "notebooks": "*.ipynb"}  # folder -> what of it


class build_with_data(build_py):
    """Copies the folders into the built package; an editable install reads them where they stand."""

    def shipped(self) -> dict[Path, Path]:
        """Where each file stands -> where a wheel has it."""
        inside = Path(self.build_lib) / "minilora"
        return {path: inside / path for folder, what in SHIPPED.items() for path in sorted(Path(folder).glob(what))
                if path.is_file() and not path.name.startswith((".", "pretraining_"))}

    def run(self):
        if self.editable_mode:
            return super().run()
        shutil.rmtree(Path(self.build_lib) / "minilora", ignore_errors=True)  # rooms that were renamed since
        super().run()
        for source, target in self.shipped().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        files = [] if self.editable_mode else map(str, self.shipped().values())
        return [*super().get_outputs(include_bytecode), *files]


setup(cmdclass={"build_py": build_with_data})
