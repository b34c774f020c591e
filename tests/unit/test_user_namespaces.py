"""Owners as a user namespace has them, names of images mounted for one, and a database from before there were any."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path

import pytest

from bootstrap.base import Attr
from nydusfs.config import load_config
from nydusfs.containerd.containers import Container
from nydusfs.convert.container import user_namespace_of
from nydusfs.drivers.idmap import IdMap
from nydusfs.errors import ConvertError, NydusError
from nydusfs.owners import Range, UserNamespace, renumbered
from snapshotter.database import MIGRATIONS, NAME, Database
from snapshotter.labels import IdMapping
from snapshotter.records import InstanceRecord, Records, instance_name, instance_of


def test_ids_outside_of_the_mapping_stay() -> None:
    shown = IdMap(10, 200_000, 5).shown
    assert [shown(owner) for owner in (0, 9, 10, 14, 15, 200_000)] == [0, 9, 200_000, 200_004, 15, 200_000]
    attr = IdMap(0, 65536, 1000).attr(Attr(0o100644, 7, 8, 3, 1, 0, 5, 6, 8))
    assert attr == Attr(0o100644, 65543, 65544, 3, 1, 0, 5, 6, 8)


def test_attributes_that_hold_ids() -> None:
    mapped = IdMap(0, 65536, 1000)
    entries = [(1, 7, 0xFFFFFFFF), (2, 5, 33), (4, 5, 0xFFFFFFFF), (8, 4, 2000), (16, 5, 0xFFFFFFFF)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    entries[1] = (2, 5, 33 + 65536)  # the group 2000 is outside
    expected = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    found = {b"user.a": b"b", b"system.posix_acl_access": acl, b"security.capability": capability}
    changed = mapped.xattrs(found)
    assert changed[b"user.a"] == b"b"
    assert changed[b"system.posix_acl_access"] == expected
    assert changed[b"security.capability"] == struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, 65536)
    back = UserNamespace((Range(0, 65536, 1000),), (Range(0, 65536, 1000),))
    assert renumbered(changed, back.user, back.group) == found
    # what is not of a known form is the kernel's to judge
    odd = {b"system.posix_acl_access": b"\2\0\0\0x", b"security.capability": b"short"}
    assert mapped.xattrs(odd) == odd


def test_owners_that_a_container_sees() -> None:
    specification = {
        "uidMappings": [
            {"containerID": 0, "hostID": 1000, "size": 1},
            {"containerID": 1, "hostID": 100_000, "size": 65535},
        ],
        "gidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65536}],
    }

    def made_with(document: object) -> UserNamespace:
        return user_namespace_of(Container("c", "i", "nydus", "k", json.dumps(document).encode()))

    seen = made_with({"linux": specification})
    assert [seen.user(owner) for owner in (1000, 1001, 100_000, 165_534, 165_535, 0)] == [0, 1001, 1, 65535, 165_535, 0]
    assert [seen.group(owner) for owner in (1000, 100_000, 165_535)] == [1000, 0, 65535]
    for without in ({}, {"linux": None}, {"linux": {"uidMappings": None}}):
        assert made_with(without) == UserNamespace()
    for wrong in ([], {"linux": {"uidMappings": [{}]}}, {"linux": {"gidMappings": 5}}):
        with pytest.raises(ConvertError, match="container c: its OCI runtime specification"):
            made_with(wrong)


@pytest.mark.parametrize("value", ["[0]", "[0,1,0]", "[-1,1,1]", "[0,4294967295,2]", '["0",1,1]'])
def test_a_mapping_that_is_none_is_refused(value: str) -> None:
    device = {"backend": {"type": "localfs", "config": {"dir": "/"}}, "cache": {"type": ""}}
    with pytest.raises(NydusError, match="id_mapping"):
        load_config(json.dumps({"device": device, "mode": "direct", "id_mapping": json.loads(value)}), "here")


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        (None, "12"),
        (IdMapping(0, 100000, 65536), "12-userns-100000"),
        (IdMapping(0, 100000, 1000), "12-userns-100000-0-1000"),
        (IdMapping(5, 100000, 65536), "12-userns-100000-5-65536"),
    ],
)
def test_names_of_mounts(mapping: IdMapping | None, name: str) -> None:
    assert instance_name(12, mapping) == name
    assert instance_of(name) == (12, mapping)
    assert instance_of(f"{name}x") is None


def test_a_database_of_before_user_namespaces(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with sqlite3.connect(path) as old:
        old.executescript("".join(MIGRATIONS[:2]) + "PRAGMA user_version = 2;")
        old.execute("INSERT INTO daemons VALUES ('d', 1, 5, 6, '/s', '/m')")
        old.execute("INSERT INTO instances (snapshot, daemon, image, bootstrap) VALUES (7, 'd', 'a/b:c', '/boot')")
        old.execute("INSERT INTO instances (snapshot, daemon, image, bootstrap) VALUES (3, 'd', 'a/b:d', '/boot3')")
    old.close()
    records = Records(Database(path))
    first = [InstanceRecord(7, "d", "a/b:c", Path("/boot")), InstanceRecord(3, "d", "a/b:d", Path("/boot3"))]
    assert records.instances() == first
    mapped = InstanceRecord(7, "d", "a/b:c", Path("/boot"), IdMapping(0, 65536, 65536))
    records.add_instance(records.daemons()[0], mapped)
    assert records.instances() == [*first, mapped]
    records.forget_instance(first[0])
    assert records.instances() == [first[1], mapped]
