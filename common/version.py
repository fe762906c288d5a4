"""The version of this code, as pyproject.toml and all manifests have it."""

VERSION = "0.1.0"
