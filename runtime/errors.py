"""The errors that users meet. They are shared with the compiler; nothing else of it is used here."""

from ir.errors import (
    BuildError,
    CheckpointError,
    ConfigError,
    GraphError,
    InfiniCoreError,
    Parser,
    Qwen3Error,
    UnsupportedError,
    run_cli,
)

__all__ = [
    "BuildError",
    "CheckpointError",
    "ConfigError",
    "GraphError",
    "InfiniCoreError",
    "Parser",
    "Qwen3Error",
    "UnsupportedError",
    "run_cli",
]
