"""`python -m tokenbound`: the same as the command."""

from tokenbound.cli import main

if __name__ == "__main__":
    main()
