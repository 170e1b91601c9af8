"""Which version of a package this process runs: Moored's own from a source tree, too."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from moored import __version__


def version_of(package: str) -> str:
    """Of a distribution; "not installed" where it is not."""
    if package == "moored":
        return __version__  # a source tree on the path has no metadata
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of several, by name."""
    return {package: version_of(package) for package in packages}
