"""Puts run_scripts/ into wheels, for `cnclip-ft scripts`; all else stands in setup.cfg."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithScripts(build_py):
    """The packages, and the scripts as a folder of cnclip_ft."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "cnclip_ft", "run_scripts")
            self.mkpath(str(target))
            for file in Path("run_scripts").iterdir():
                self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": WithScripts})
