"""``python -m codegen``: build, verify and look into engines."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ir.errors import Parser, run_cli

# Each command is a module of this package with ``add_arguments(parser)`` and ``run(arguments) -> exit status``; its first docstring line is the help.
COMMANDS = {
    "build": "codegen.command_build",
    "targets": "codegen.command_targets",
    "inspect": "codegen.command_inspect",
    "verify": "codegen.command_verify",
    "check-ops": "codegen.command_check_ops",
}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m codegen",
        description="Compile Qwen3 to a C++ engine of InfiniCore calls, and look into the result.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(module) for name, module in COMMANDS.items()}
    for name, module in modules.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    return modules[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))
