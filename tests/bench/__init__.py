"""Benchmarks beside the peers, in one run, in alternating rounds: `make bench`, or `python -m tests.bench --help`.

    __main__.py   the command: which scenarios, how long, where to
    scenarios/    one module for each: relay, cold, handover (`pass`), rest, udp
    peers.py      what is measured: Dormant and the programs that people use today, each started on loopback
    servers.py    the backends that no Debian package offers: a sink for bulk, an echo of streams and of datagrams
    load.py       the clients of relays: wrk, redis-benchmark, bulk streams, idle connections
    processes.py  programs with a deadline, and what they use
    results.py    samples and what follows from them: medians, ratios in the same round, spreads
    report.py     the table, as text, Markdown and JSON

Figures are ratios against HAProxy in the same round, because the machine's own speed changes from minute to minute.
Timings are no tests: nothing here fails because something was slow.
"""
