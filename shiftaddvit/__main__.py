"""`python -m shiftaddvit …`, for launchers that start modules."""

from shiftaddvit.cli.main import main

if __name__ == "__main__":
    main()
