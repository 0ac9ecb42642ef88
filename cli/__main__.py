"""`python -m tpserve.cli` is the `tpserve` command."""

from tpserve.cli.main import main

if __name__ == "__main__":
    main()
