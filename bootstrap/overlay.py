"""One layer over another, and whiteouts. Reference: RAFS format 5.9."""

from __future__ import annotations

import stat

from bootstrap.tree import Node, copy_attributes, has_default_attributes

OCI_PREFIX = b".wh."
OCI_OPAQUE = b".wh..wh..opq"
OVERLAY_OPAQUE = b"trusted.overlay.opaque"


def is_removal(node: Node, spec: str) -> bytes | None:
    """The name this node removes below it, None if it is no such whiteout."""
    if spec == "oci":
        name = node.name
        if name.startswith(OCI_PREFIX) and name != OCI_OPAQUE and len(name) > len(OCI_PREFIX):
            return name[len(OCI_PREFIX) :]
    elif spec == "overlayfs" and stat.S_ISCHR(node.mode) and node.rdev == 0:
        return node.name
    return None


def is_opaque(directory: Node, spec: str) -> bool:
    """Whether an upper directory hides everything that lower layers have in it."""
    if spec == "oci":
        return directory.children is not None and OCI_OPAQUE in directory.children
    if spec == "overlayfs":
        return bool(directory.xattrs) and (directory.xattrs or {}).get(OVERLAY_OPAQUE) == b"y"
    return False


def drop_whiteouts(root: Node, spec: str) -> None:
    """Take the whiteouts themselves out of a tree that nothing lies below."""
    if spec == "none":
        return
    stack = [root]
    while stack:
        children = stack.pop().children
        assert children is not None
        gone = [name for name, node in children.items() if is_removal(node, spec) is not None]
        if spec == "oci" and OCI_OPAQUE in children:
            gone.append(OCI_OPAQUE)
        for name in gone:
            del children[name]
        stack += [node for node in children.values() if node.children is not None]


def apply_layer(lower: Node, upper: Node, spec: str = "oci") -> Node:
    """`upper` over `lower`: whiteouts of the upper layer act on the lower one only and vanish.

    Both trees are used up; the result is `upper` with what remains visible of `lower` hung into it. Directories that
    the upper layer only implies, and a root it does not describe, have the lower attributes.
    """
    if has_default_attributes(upper):
        copy_attributes(lower, upper)
    stack: list[tuple[Node, Node]] = [(lower, upper)]
    while stack:
        below, above = stack.pop()
        olds, news = below.children, above.children
        assert olds is not None and news is not None
        removed: set[bytes] = set()
        opaque = is_opaque(above, spec)
        gone = []
        for name, node in news.items():
            victim = is_removal(node, spec)
            if victim is not None:
                removed.add(victim)
                gone.append(name)
        if opaque and spec == "oci":
            gone.append(OCI_OPAQUE)
        for name in gone:
            del news[name]
        if opaque and spec == "overlayfs" and above.xattrs:
            above.xattrs = {k: v for k, v in above.xattrs.items() if k != OVERLAY_OPAQUE} or None
        fresh = []  # upper directories with nothing below them may hold whiteouts all the same
        for name, node in news.items():
            if node.children is None:
                continue
            old = None if opaque or name in removed else olds.get(name)
            if old is not None and old.children is not None:
                if node.implied:
                    copy_attributes(old, node)
                stack.append((old, node))
            else:
                fresh.append(node)
        for node in fresh:
            drop_whiteouts(node, spec)
        if not opaque:
            for name, node in olds.items():
                if name not in removed and name not in news:
                    news[name] = node
    return upper
