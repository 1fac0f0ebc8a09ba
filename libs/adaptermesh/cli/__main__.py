"""Entry point of the `adaptermesh` command."""

from adaptermesh.cli.app import build_app


def main() -> None:
    """Runs the command line and exits."""
    build_app()()


if __name__ == "__main__":
    main()
