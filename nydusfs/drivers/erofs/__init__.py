"""Images as EROFS mounts of the kernel, over the same cache that the FUSE driver serves from.

The story: `selftest` (can this machine do it?), `image` (metadata image of a bootstrap), `devices` (segment files that
are its data), `mount` (system calls), `driver` (an image on top of its FUSE directory), `events` (the kernel asks for a
segment), `journal` (what the next worker must know when this one dies). `fanotify` and `mount` bind the system calls.
"""
