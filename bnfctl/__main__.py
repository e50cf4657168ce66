"""`python -m bnfctl`."""

from bnfctl.cli import main

if __name__ == "__main__":
    main()
