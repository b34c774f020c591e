"""The published experiment of Nydus with Dragonfly, repeated: six ways to start four images, each timed.

    python -m tests.lab.experiment [--quick] [--cases ...] [--links ...] [--scenarios ...] [--repeats N] [--upstream]

Everything is real: registry, containerd, nerdctl, Dragonfly (scheduler, seed peer and two peers), and programs that run
in the containers. What is modelled is the link to the registry (`tests.lab.shaper`); peers talk over loopback.
Results are kept in one file, line by line: a run that was cut goes on where it was.
"""
