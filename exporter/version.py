"""The version of enginesmith, as manifests and `--version` show it."""

VERSION = "0.1.0"
