"""The published experiment of Nydus with Dragonfly, repeated: six ways to start four images, each timed.

    python -m tests.lab.experiment [--quick] [--cases ...] [--links ...] [--sides ...] [--scenarios ...] [--repeats N]
    python -m tests.lab.experiment --report [--merge FILE ...] [--into docs]

Everything is real: registry, containerd, nerdctl, Dragonfly (scheduler, seed peer and two peers), and programs that run
in the containers. What is modelled is the link to the registry (`tests.lab.shaper`); peers talk over loopback.
Results are kept in one file, line by line, each with its load, time and commit: a run that was cut goes on where it
was, and rows may be measured one at a time, on any day. The second form only writes tables and charts of what is kept;
`--into` writes every start of them as well (`docs/experiment.jsonl`), to be merged with those of a later run.
"""
