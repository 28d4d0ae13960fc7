"""Tests the kernels on the machine where they run, each op and backend in a process of its own.

`processes.ensure` tests what has no result yet, and `python -m clp_kernels.selftest` tests all and
prints a table. `clp_kernels.trust` keeps the results, and excludes from "auto" what has failed or
is not tested.
"""
