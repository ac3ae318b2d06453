"""See `tools.rehearse`."""

import sys

from simrl.run.program import run_program


def main() -> None:
    try:
        from tools.rehearse import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is not installed: pip install -e '.[study]'")
    run.main()


if __name__ == '__main__':
    run_program(main)
