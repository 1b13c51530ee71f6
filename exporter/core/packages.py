"""Installed packages, by their metadata: nothing is imported."""

from importlib import metadata


def installed_version(package: str) -> str:
    """The version of an installed distribution; empty where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
