"""What compiled Python modules import, and where in an image that is. Nothing of them is run."""

from __future__ import annotations

import base64
import random
import zlib

import pytest

from nydusfs import pyc
from nydusfs.imports import Importer, Kind
from nydusfs.pyc import Import

# `SOURCE`, compiled by six versions of CPython as /lib/p/q/m.py: base64 of zlib.
SOURCE = """
import json, os.path
from . import core, lib as other
from ..above import thing
from .core.deep import *
try:
    import _fast
except ImportError:
    _fast = None
(constants of every kind, a class and functions with imports of their own)
"""
COMPILED = {
    "cpython-38": (
        "eNptUk1uEzEUfvbMJJPJTwNiwQJVbMNiwgGqqgIqxIIsSKqCBbKmsdMEPOPUnoIStat2wRKOwQW4ABI7LuAdYtUrsMJv0tAWMdY8v7Gf"
        "v/d933iv3U4IALjvo4+jHz+zX/DPk/h3x7/2kw8CGAgiqCKMVDNlgQhEqMI8YlFeY3UCIhI1FecN1vB5IOoqGcGyVVU3WXMfirshyNa7"
        "xLwmgENQ1nwFBX2J1bFoiES2fRZN6RkRTdESbUFFZ5KwzlMQG6J7DqJ7RtmGoEPo3VrW9rURNr1AroMLlNKjLhxrI12gZgcXFFeIi8rp"
        "rDj0CXlwuBIW7qjoutBwcVN4vHNc99OHb19NKY3F2oNFKW06Gv/rEV17dM8HCd4bYLRSHKz8OQcWVnwjFw2n2VwaJDoYk2sgwSXQYwTa"
        "RLM9jIJTUs3klHobgnMo6RM4Ix4qHFQgNzDoJc4QMbo+HMIJvIlPyQn5TI/CIXwB01hZRNOHjhTVVxV+t/verv68f9TP0/nCJVtqZsux"
        "zufbCGRDH2q+wXKzEpCqrJTpltLjTNnt9Kq4F7jwrdWFS3ShFhzLjKsP9p4/2n0xxE0r1cR0sO3GuvcqtPAahnigjQ1rKIjEfiyTq5be"
        "wZjzIssl5y7hPNfiWGHe4vzoOFOrHVabFXYmpLl9s8XfPib2obnWhU2qlV7X1TkXesx5RZHVtU3nWTl1VFsHBr01eMJFupxKw6LsQL+X"
        "BrmyBl66VEg5ZxGfZLZ0zWf5XJty1xhtXGNi9FIWVpamu2bwP2ou3lqJ2sY/a+/g1SRdP1qeJfWxQxJyn/wBDEHEvQ=="
    ),
    "cpython-39": (
        "eNptUstuEzEUtT0zyWQyaVOBWKGKbRCa9AOiKCpUhQVBIkUVlpA1iZ0H8oyn9hSUqF21ayRWfAM/wA/wF96y6hoJJFb4Tlr6EGP52GNf"
        "n3vusdNWK8IIoV+9V1/2nz/5/QPd+SLXB66bTw44oohjTiSmuBoJ9bjHfelnAQ2yGq1jxANek2HWoA0393hdRgdoFVfRTdo8RPkDH4l4"
        "STGCxgltvkU52YHYkDd4JFpuFszJGeZNHvMWJ3xjGtGNfcQ3efsc8fYZoZucjFBna1U7VJqb5AKUDi+gkA6x/kRpYT25GF8QWME2KOeL"
        "fOYm+PFsXZY/kMHNMv3l7bLDwXHdDR+/f9Ol0AZix8tSmORgctchcuXQQwcCOWcQJVW93tqdc0T9Sm9gg9E8LYQGocMJvkHiXRI9BaJt"
        "sNrRSHSKqxGfEmeDd45K8gydYUflDyuSWxzkkmcEHG0HM3SC3oWn+AR/Jkf+CH1FurG2iCQ7FufVXwV/Wl1nV7foHnWzpFjaqCcXppyo"
        "rOgD0U+gX21X4hOZliLpSTVJpekn14Edz/rvjcptpHK5ZBCmbX345uXu3usRbBohp3oTUrav8q4hdmB9ONAC6TXIhkPXVtF1SudeyFie"
        "ZoIxGzGWKX4sYR4zdnScyvUOrS1ys+BC37ud4l8eHTpoQhofrtklqVY6bVtnjKsJY5VEWlcmKdJybokyFmnwVcMJG6hyLjQN0rH6IDRo"
        "pQ14cAkXoqABm6amtM0XWaF0uae10rYx1WolciNKvXWl4H/SbNhbF9WHWzX34VnitmuxU0kcxjjCj/BfTc3Djw=="
    ),
    "cpython-310": (
        "eNptUktu2zAQHVKSLUu2o2bVRRF06wKVe4AgSD9B00W9qFMEJVAQiknHLihRIZUGNpJVvC6QI3TZC/QCvQW3WeUK2bSkHOeHSuAbihy9"
        "efNI2elECAB6uxevf+5eX17CoyeyY9sO/cMCAwIMMSwQQXXExGMe84WfByTIG6SJgAWsIcK8RVp27rGmiPZg3qizYxLvQxH7wNuzlwjc"
        "yzCJv0CBTlxuyFos4h07Cyb4HLGYtVmHYdYdR6T7HtgaSxbAknNM1hgeQu/JvLEvFdPplVM6uKobwcYfScWNJ6YHV9itIBNUk2lxaCfo"
        "xeGyLX9bBPfb9GcP2w63j5s2nPz5rSqutMs9mFVcp3ujxw7hlUPPLHCwzgDBdb/e0p0FEL/WG5hgOMlKrpzQwQjdI/FuiN46og1ntaUR"
        "cIbqiM6wtcFbQIXfwTmyVP6gJnnAgW94ho4jsXAIp/DVP0On6AIfWQG/QLWWFuH0lUFF/VXDdadv7eqX/aN+npYzE22Kqa5GMi+3HJF2"
        "1AnMN2r5qcgqnm4KOcqE3krvUnue8b9pWZhIFmJGXZoyzcHnj292Pg3dpuZirLqu6Nqq8hLaFozvfui4cg13AihEXTSP7kpa/0JKiyzn"
        "lJqI0lyyY+HmbUqPjjOx3CGNaaGnjKv1hyVu66jQQnxbxhZqo3qtl5gmpUyOKK1FkqbUaZlVE4OlNqCct8p3SgNZTbgiQXYgv3PlaEjL"
        "XbqUcV6SgI4zXZn4Q15KVe0oJZVpjZWc80LzSiUrDf8TZ8LNZVtb7mT1U3c1IUGJ1RgibLGOf5/jdfQP4ljEnQ=="
    ),
    "cpython-311": (
        "eNptUk1oG0cUfjO765VWUiwlKUmgFIFCQE2yjiEQCsaEUBMCjQ+VS5qFsqw1Y0thtavMrOvYxKCDDzn04J7aS0Ig4LrEh55K773kqIAP"
        "y5wKPRTfVNyA8anzVpF/Eu97vJnZ9+ab730zv5RKDgGAJ/H2hR3+7t7fcOxz3o972zr8BAw8YITRkHgkG6lnMIOZodmxPKsz5tkEmMXG"
        "wlwn7+X13GB26MxBfrir4BWiUg148TIIS2epV3gIkbkMT4yHsEx0dY7lmUOBl/TcatFNTew1GZFhBVZkJUbZmQXHO0PhLrDxdWDlTaqr"
        "6KjKG2e0AfXK6tiDWDDp7uLP2V1EqVNlNmPBlRG253dxR50oK2m1o0U9IZ8vDhHM26F1XARzBU58udtLth6W//xdJFxIrJ1fSbh055rH"
        "y0aM9j7NtOOgNQOPZkoYqNs6eGbG1VRWoxV0ucAts03yAYiBIDeHF6AhQlgj2UjWKKPrkJhH5V/Cpo6vD9ca3JjNYE+gIuI5RD2boS7C"
        "U/jOXCNPyY/0B6sBv4IoDeWi7g1FIokA1epBaULrNtGdeDzRcbsrB85U2JZJM+50p1c/yxpwwyDh7lQYN4NQTrtH+bIGkBd16EF/vDb0"
        "jWCDHC72kFbdUOYjGUfKiaNwxUcwoezZb+7fmfm6gUnJwwWBxMV5BDQyWlWB6MrE8lXniAe2IK9mZ6a5c88KaGnuUn/kaXbw81s6vB2v"
        "7ehVriZQkLqlcr4fBR3u+8rx/U7MlkKcF33/8VIQvs+MtSPZZlxcQD54WLY5IyOcUSggiWsZiZGlZqV3H21ADevyAD4OQyDcXi8r2/dZ"
        "3PT9rG9lx9LtBklL0VgqEHj1Ah+gsuKkpdWygvn4ey7wfao8vnWXcd5Vlr8QyEQV7nW6sUhmhIiFyi+IeJVHkifik0POJ/s4yE0Nm58W"
        "V/QSn5D8R4eBQQhJodgrpnC+f5qnUO2f5ilc6p/0FC72R64VIZXULPe+Gtp+ap8dACGVo5AWy70ZNORQ2d/f/6tQfNbcuPXznZf5l/mt"
        "ya1g68rb6uROdfK3L/5ovTHezPUbD/rOtz17QC2i9f04/Ivhv1MSsqh7fWHW4JV93dgm143/AZIDOj0="
    ),
    "cpython-312": (
        "eNpVUk1oE0EUfjOzm91skiaxgq0/UEwR4yGlJxFE2tIiHszBVGoXZNlktk1lk01nt8YUC0V68FC09aKnirdIETyJ1+Kl4KUoiE4qPXjq"
        "rbQHtQdxZtNIHdjvvZl573vvfbMfEwkDAUD9ydoGbv7p/QHHlnFkD9YEPAcKJlBEsYtMFFpsEkqo4ioV1VQrEVNDQFUacfVK1IwKn1DN"
        "Nd5gBNF2XsyMiTOdRqmBwUkIXy3jddQuQmM0ThMU064pw+zCcB1ocgloah23781kA2fAifcDUwU3NmOTsHyxDg/IJNRRNj0fmfAY9XO7"
        "Mji/K1mzmCsljzmcuDPFXcmTRVwNyjPVaeGgS9NtZmXIVY+PrTTgv6UPzWlSog/vWOAwX8YWG4Hj58ZLx8NwR63ToVoOCJXAxOHkRCq1"
        "BKbSwFmFq4WyXXOYTMiX0PHK4iOSYrQtuCBwYQGFFi3gQOkEjsJTUsLTUMJ3xdkCeUhW8XJEEfsFUhCIQq8uFMiHZbKEK/d8r8oNr+o2"
        "LNcWg3Atf/vmyNitguhI8R13isVFJEsI4Kjqy1p9Yh0mBoR6A7WB2YFKrtbgikyeN8IRctKXCf5ZAYvQ0rtbeu/2mfNfkpkV+xn6lMxs"
        "6ZnfwoR0q9FzSlblumVV7YpjWdywrIpH51zpxy1rds52j24iM1V/hjrshEh7DQdyZpaWYHQgJstKZwlaSvoAE7Wf9XQusymuWRb1SpYV"
        "TsU1z8/V7KDMsedzYLIbJh+Sq15QFlqodtG77zD5zjwq/5kcdZwaV60p2w947Eal5rFgjDGP8egU8+adqu8ErOtfR6ck9HS6PNSvtue6"
        "xjJiK5/YLwrYIwihbxDfgZM70PcderehZw8TlG4pqb0IxBOPSyuXX4y8ijYHm3bzwue+wbdX3pc3yeb4VmFiy7izqP3EKurfBwG/9jTQ"
        "u/cBofTXeOrRmOROH/qy/EtlGMMG1objZCOGBP4FfzPm5w=="
    ),
    "cpython-313": (
        "eNpVUkFoG0cU/TM7q12tJMuqa4idECu2adgeJExrTKENtsElsYgImbQJxDCspJWlIu8qf9Ytzin0EHJ0C4WGHtJCD84tp5CrySVHJ7kk"
        "o5gccvLN1JSkOWVGsoszoPe/5v95//+3/yCX8wgAvCv2/v7jxeXWGzh2vEN78KeG34ADAiecVgiSvqVocYuzClu20V5OoVMEbvNUxV1O"
        "Y1r7Fncq3hwtwunBuwxm9J3L09xbyU2auD1DZ8mgCM/wLM9xyoe+9HDoBOh4fhz48CwdxDG/Ss/AStaBwAbQ7BQzE1D1m/CNNQFN4hdu"
        "pq7G2JClPZNe3TO8PlWsHmOorE67tmeYfKLspNWOVrVDPl8dcLP5jn18cLYBHx13ft3R5qfHDzEJUZrc2kYSytKV+vE0eqTXZF+vFdA6"
        "AVJOtE6UWxWGjLNxQJvbmFq1/JSyeSvohnsZM595Xa2T423on2X4vh3or9kqEJG+JRG9zo4SR+B7S9IySHpe38VfXKIXUwAZrZKkkTWt"
        "ceA1tSDVfiHfUuwHGUfKi6POhugEei7lVL+7uLh0mftMMRl2mpgzfQ1pUCSSplpRH5UrazHL3fKN8lqpu6GYeay8/iQl45tXsqjhFvTc"
        "kZ47tnty8nl+6u7cZvAruTv3ND+140799yw/1af8xTvN7oPvKFeIKFgLhVCeEGtxY71j/KwQN9aDzmEkL0SzjTLptKMwivVFqh3JdiPE"
        "EdPkqBAyCZJ2XQRJgu3auv5EQuCokbC/Qp8Y8I7AqC6Ncxt6rPAvtexpPHUU9IeVI0QjrmsCM5ByYlnqBklL0VgqQNM6mkVQdpy0tHh2"
        "UIt/DNHsiUqbnSs1wrCrbNEMZKIyF9a6MSZLiDGqdBPjm2EkwwTz/3dkuhyUN10q9+uBBOfwrP5rtkLWNOxbhJCXkH0Nn76G4i6MvYIT"
        "+9QihR4b3k9BNnenvjn3++Jf6a2ZrWDrs+fFmQdfPWo9sZ5c2eFXd7xrt5y31CbT/4CGd/sOuCMHQEjhRXb45yXDXXgvC7rMPbZAYZu6"
        "CzlrO0s0fgCBmfW5"
    ),
}
IMPORTS = (
    Import(0, b"json", ()),
    Import(0, b"os.path", ()),
    Import(1, b"", (b"core", b"lib")),
    Import(2, b"above", (b"thing",)),
    Import(1, b"core.deep", (b"*",)),
    Import(0, b"_fast", ()),
)


def compiled(tag: str) -> bytes:
    return zlib.decompress(base64.b64decode(COMPILED[tag]))


@pytest.mark.parametrize("tag", COMPILED)
def test_imports_of_the_module_itself_are_found(tag: str) -> None:
    module = pyc.read(compiled(tag))
    assert module is not None
    assert (module.tag, module.filename, module.imports) == (tag.encode(), b"/lib/p/q/m.py", IMPORTS)


def test_data_of_any_kind_raises_nothing() -> None:
    rng = random.Random(3)
    read = 0
    for tag in COMPILED:
        good = compiled(tag)
        assert pyc.read(b"\0\0" + good[2:]) is None  # another version's
        for end in range(0, len(good), 7):
            pyc.read(good[:end])
        for _ in range(400):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            module = pyc.read(bytes(data))
            read += module is not None
            if module is not None:
                importer(b"/lib/p/q/__pycache__/m." + module.tag + b".pyc").follow(1, module)
    assert read
    head = compiled("cpython-311")[:16]
    assert pyc.read(head + b")\x01" * 100_000) is None  # deeper than any program
    assert pyc.read(head + b"\xe3" + bytes(20) + b"(\xff\xff\xff\xff" * 3) is None


def importer(*paths: bytes) -> Importer:
    """Inodes are numbers from 1 in this order."""
    folders: dict[bytes, dict[bytes, tuple[int, Kind]]] = {}
    for number, path in enumerate(paths, 1):
        kind = Kind.FILE
        while path:
            path, _, name = path.rpartition(b"/")
            folders.setdefault(path, {}).setdefault(name, (number, kind))
            kind = Kind.FOLDER
    return Importer(lambda path: folders.get(path, {}))


def hostile(imports: list[tuple[int, bytes, tuple[bytes, ...]]], before: bytes = b"") -> bytes:
    """A module of CPython 3.8 that imports these, `before` standing in front of its code."""

    def long(kind: bytes, data: bytes) -> bytes:
        return kind + len(data).to_bytes(4, "little") + data

    def many(parts: list[bytes]) -> bytes:
        return b"(" + len(parts).to_bytes(4, "little") + b"".join(parts)

    def operation(code: int, argument: int) -> bytes:
        return b"".join(bytes([144, argument >> shift & 255]) for shift in (16, 8)) + bytes([code, argument & 255])

    code, consts, names = before, [], []
    for level, name, wanted in imports:
        code += operation(100, len(consts)) + operation(100, len(consts) + 1) + operation(108, len(names))
        consts += [b"i" + level.to_bytes(4, "little"), many([long(b"s", one) for one in wanted])]
        names.append(long(b"s", name))
    nothing = many([])
    parts = [long(b"s", code), many(consts), many(names), nothing, nothing, nothing, long(b"s", b"/lib/m.py")]
    body = b"c" + bytes(24) + b"".join(parts) + long(b"s", b"m") + bytes(4) + long(b"s", b"")
    return (3413).to_bytes(2, "little") + b"\r\n" + bytes(12) + body


@pytest.mark.timeout(60)
def test_what_a_hostile_module_claims_costs_little() -> None:
    """Each of these kept a daemon busy for minutes, most in the thread that serves all images."""
    one = (0, b"json", (b"dumps",))
    read = pyc.read(hostile([one]))
    assert read is not None and read.imports == (Import(*one),)
    read = pyc.read(hostile([one, (2**31, b"far", ()), (0, b"." * 100_000, ()), (0, b"x", (b"y" * 5000,))]))
    assert read is not None and read.imports == (Import(*one), Import(0, b"x", ()))
    read = pyc.read(hostile([(0, b"m%d" % number, ()) for number in range(20_000)]))
    assert read is not None and len(read.imports) == pyc.MAX_NAMES
    read = pyc.read(hostile([one, (0, b"x", tuple(b"%d" % number for number in range(100_000)))]))
    assert read is not None and read.imports == (Import(*one),)
    # tuples in tuples, each of which is what another import wants
    deep = b"".join(b"\xa9\x01" for _ in range(20_000)) + b"N"
    code = b"".join(
        b"\x90%c\x64%c\x90%c\x90%c\x64%c\x6c\0" % (0, 0, n >> 16, n >> 8 & 255, n & 255) for n in range(1, 20_000)
    )
    refs = b"".join(b"r" + number.to_bytes(4, "little") for number in range(1, 20_000))
    consts = b"(" + (20_001).to_bytes(4, "little") + b"i" + bytes(4) + deep + refs
    parts = b"s" + len(code).to_bytes(4, "little") + code + consts + b")\x01z\x01x" + b")\0" * 3 + b"z\x05/a.py"
    pyc.read(
        (3413).to_bytes(2, "little")
        + b"\r\n"
        + bytes(12)
        + b"c"
        + bytes(24)
        + parts
        + b"z\x01m"
        + bytes(4)
        + b"s"
        + bytes(4)
    )
    # an argument that gets longer and longer; then an instruction that ends it
    read = pyc.read(hostile([one], before=bytes([144, 255]) * 900_000 + bytes([9, 0])))
    assert read is not None and read.imports == (Import(*one),)


def test_files_are_found_as_the_interpreter_would() -> None:
    paths = (
        b"/lib/p/q/__pycache__/m.cpython-311.pyc",
        b"/lib/p/q/__pycache__/__init__.cpython-311.pyc",
        b"/lib/p/__pycache__/__init__.cpython-311.pyc",
        b"/lib/p/q/core/__pycache__/__init__.cpython-311.pyc",
        b"/lib/p/q/core/__pycache__/deep.cpython-311.pyc",
        b"/lib/p/q/lib.abi3.so",
        b"/lib/p/above/__pycache__/thing.cpython-311.pyc",  # a namespace package
        b"/lib/__pycache__/os.cpython-311.pyc",  # is frozen
        b"/lib/json/__pycache__/__init__.cpython-311.pyc",
        b"/lib/lib-dynload/_fast.so",
        b"/lib/__pycache__/inside.cpython-311.pyc",  # of a class body
        b"/lib/p/q/__pycache__/json.cpython-311.pyc",  # not absolute
    )
    module = pyc.read(compiled("cpython-311"))
    assert module is not None
    imports = importer(*paths)
    found = [paths[ino - 1] for ino in imports.follow(1, module)]
    assert found == [paths[8], paths[3], paths[5], paths[6], paths[4], paths[9]]
    assert imports.origins == {6: b"/lib/p/q", 10: b"/lib/lib-dynload"}
    assert importer(*paths).follow(2, module) == []  # compiled for another place
