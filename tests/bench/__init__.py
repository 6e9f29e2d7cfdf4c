"""Benchmarks beside the peers, in one run, in alternating rounds: `make bench`, or `python -m tests.bench --help`.

Figures are ratios against HAProxy in the same round, because the machine's own speed changes from minute to minute.
Timings are no tests: nothing here fails because something was slow.
"""
