"""`python -m kdlib_faces` runs the command line."""

from kdlib_faces.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
