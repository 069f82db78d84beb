"""How fast ULSAM is, always as a ratio to something measured beside it in the same run.

`python -m benchmarks` measures every row that the machine can; `python -m benchmarks --help` says what else there is.
Not part of the installed package.
"""
