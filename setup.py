"""The packages of the wheel; pyproject.toml has the rest.

A wheel holds conf/ as ldm/conf/. pyproject.toml can either search for packages or rename one.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["ldm*", "hydra_plugins*"]), "ldm.conf"],
    package_dir={"ldm.conf": "conf"},
    package_data={"ldm.conf": ["**/*.yaml"], "ldm.assets": ["**/*"], "ldm": ["py.typed"]},
)
