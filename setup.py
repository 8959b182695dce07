"""Package discovery for the three layers, which live in three folders of this tree."""

from setuptools import find_packages, setup

LAYERS = {"sgl_psa": ".", "sglang_psa": "python", "sgl_psa_kernels": "kernels"}


def all_packages() -> list[str]:
    """Every package of the three layers, found by folder."""
    return [
        package
        for name, root in LAYERS.items()
        for package in find_packages(root, include=[name, f"{name}.*"])
    ]


setup(packages=all_packages())
