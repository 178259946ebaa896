"""No file of this folder holds tests, and its modules import packages that only `make mutants` installs."""

collect_ignore_glob = ["*.py"]
