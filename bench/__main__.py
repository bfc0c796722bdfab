"""python -m bench COMMAND: the benchmarks; run them from the repository's root."""

import argparse

from bench import accuracy, capability, compare, cpu, ops, profile, table

COMMANDS = {
    "cpu": cpu,
    "ops": ops,
    "profile": profile,
    "compare": compare,
    "table": table,
    "accuracy": accuracy,
    "capability": capability,
}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__.splitlines()[0]))
    options = parser.parse_args()
    COMMANDS[options.command].main(options)


if __name__ == "__main__":
    main()
