"""`python -m sepress`."""

from sepress.cli import main

if __name__ == "__main__":
    main()
