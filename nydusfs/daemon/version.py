"""What the daemon says about itself: `-V`, the first log line and the API."""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import TypedDict

VERSION = "v0.1.0"


class BuildInfo(TypedDict):
    package_ver: str
    git_commit: str
    build_time: str
    profile: str
    rustc: str


@cache
def build_info() -> BuildInfo:
    """`git_commit` and `build_time` come from the environment of a packaged build, else they are "unknown"."""
    return {
        "package_ver": VERSION,
        "git_commit": os.environ.get("NYDUS_BUILD_COMMIT", "unknown"),
        "build_time": os.environ.get("NYDUS_BUILD_TIME", "unknown"),
        "profile": "release",
        # Upstream's clients read this key; here it names the interpreter.
        "rustc": f"{platform.python_implementation()} {platform.python_version()}",
    }


def version_text() -> str:
    """The `-V` answer. Tools match `Version:\\s*(v.*)` in it."""
    info = build_info()
    return (
        f"nydusd Version: \t{info['package_ver']}\nGit Commit: \t{info['git_commit']}\n"
        f"Build Time: \t{info['build_time']}\n"
        f"Profile: \t{info['profile']}\nRustc: \t\t{info['rustc']}"
    )


def version_line() -> str:
    info = build_info()
    return (
        f'Program Version: {info["package_ver"]}, Git Commit: "{info["git_commit"]}", '
        f'Build Time: "{info["build_time"]}", Profile: "{info["profile"]}", Rustc Version: "{info["rustc"]}"'
    )
