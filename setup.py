"""Builds the distribution `vlmserve`; what it is stands in setup.cfg."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPackages(build_py):
    """The package `vlmserve` is the repository's root, where this file lies but does not belong."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("vlmserve", "setup")]


FLOORS = find_packages(include=["server*", "router*", "models*"])
setup(
    packages=["vlmserve", *(f"vlmserve.{name}" for name in FLOORS)],
    cmdclass={"build_py": BuildPackages},
)
