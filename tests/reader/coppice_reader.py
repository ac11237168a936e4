#!/usr/bin/env python3
"""Reads a Coppice store by docs/format.md alone, without its index.

    coppice_reader.py STORE list               snapshots as JSON
    coppice_reader.py STORE verify             every pack, frame, object and entry
    coppice_reader.py STORE export NAME FILE [--part disk0|memory|state|stream]

Nothing is believed before its checksum or hash was computed. Any difference
from the page ends the program with one line and exit code 1.
"""

import argparse
import json
import os
import struct
import sys

import blake3
import zstandard

PAGE = 4096
PLAIN_MAX = 1 << 20
ENTRIES_MAX = 1 << 24
PACK_MAX = 1 << 40
IMAGE_MAX = 1 << 44
PACK_ID_LIMIT = 1 << 40
ROLES = {1: "memory", 2: "disk", 3: "state", 4: "stream"}
PAGES, OBJECTS, CATALOG = 1, 2, 3
NODE, PATCH, ROOT, SNAPSHOT, EVENT = 1, 2, 3, 4, 5
COMMIT, TAG, UNTAG, DROP = 1, 2, 3, 4


class Bad(Exception):
    """Bytes that are not what the format says."""


def need(condition, what):
    if not condition:
        raise Bad(what)


def derived(what, *parts):
    hasher = blake3.blake3(derive_key_context=f"coppice 2026-11 {what} v1")
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def checksum(what, *parts):
    return derived(f"{what} checksum", *parts)[:16]


class Fields:
    """Takes fields from the front of some bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count, what="field"):
        need(self.at + count <= len(self.data), f"{what} is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size):
        return int.from_bytes(self.take(size), "little")

    def zeros(self, count, what):
        need(not any(self.take(count)), f"{what}: a zero is not zero")

    def counted(self, limit, what):
        length = self.number(4)
        need(length <= limit, f"{what} is too long")
        return self.take(length, what)

    def end(self, what):
        need(self.at == len(self.data), f"{what}: bytes behind the end")


def bits(bitmap):
    return [n for n in range(128) if bitmap[n // 8] >> (n % 8) & 1]


def parse_frame(data, where):
    """Kind and objects: (object kind or None, bytes) in order."""
    need(len(data) >= 80 and data[:4] == b"CPF1", f"{where}: no frame")
    codec, kind, cipher = data[4], data[5], data[6]
    stored_len, plain_len, count = struct.unpack_from("<III", data, 8)
    need(data[7] == 0 and not any(data[20:24]), f"{where}: frame header")
    need(codec in (0, 1) and kind in (1, 2, 3) and cipher == 0, f"{where}: frame header")
    need(not any(data[24:64]), f"{where}: nonce or tag without a cipher")
    need(stored_len <= plain_len <= PLAIN_MAX, f"{where}: frame lengths")
    need(len(data) == 80 + stored_len, f"{where}: length of the frame")
    stored = data[80:]
    need(checksum("frame", data[:64], stored) == data[64:80], f"{where}: frame checksum")
    if codec == 0:
        plain = stored
    else:
        size = zstandard.frame_content_size(stored)
        need(size == plain_len, f"{where}: would decompress to {size} bytes")
        plain = zstandard.ZstdDecompressor().decompress(stored, max_output_size=plain_len)
    need(len(plain) == plain_len, f"{where}: plain length")
    objects = split_pages(plain, where) if kind == PAGES else split_objects(plain, where)
    need(len(objects) == count, f"{where}: number of objects")
    return kind, objects


def split_pages(plain, where):
    need(len(plain) % PAGE == 0, f"{where}: pages are not whole")
    return [(None, plain[at : at + PAGE]) for at in range(0, len(plain), PAGE)]


def split_objects(plain, where):
    fields, objects = Fields(plain), []
    while fields.at < len(plain):
        kind = fields.number(1)
        fields.zeros(3, f"{where}: object")
        need(NODE <= kind <= EVENT, f"{where}: object kind")
        objects.append((kind, fields.counted(PLAIN_MAX, where)))
    return objects


def id_of(kind, data):
    if kind == PATCH:
        return data[:32]
    names = {None: "chunk", NODE: "tree node", ROOT: "image root"}
    names |= {SNAPSHOT: "snapshot", EVENT: "catalog event"}
    return derived(names[kind], data)


def parse_node(data):
    fields = Fields(data)
    level = fields.number(1)
    fields.zeros(1, "node")
    count, bitmap = fields.number(2), fields.take(16)
    slots = bits(bitmap)
    need(level <= 4 and len(slots) == count > 0, "node header")
    children = {slot: fields.take(32) for slot in slots}
    fields.end("node")
    return level, children


def encode_node(level, children):
    bitmap = bytearray(16)
    for slot in children:
        bitmap[slot // 8] |= 1 << (slot % 8)
    head = struct.pack("<BBH", level, 0, len(children)) + bytes(bitmap)
    return head + b"".join(children[slot] for slot in sorted(children))


def parse_patch(data):
    fields = Fields(data)
    node, base = fields.take(32), fields.take(32)
    changed, present = bits(fields.take(16)), bits(fields.take(16))
    need(set(present) <= set(changed), "patch bitmaps")
    ids = {slot: fields.take(32) for slot in present}
    fields.end("patch")
    return node, base, {slot: ids.get(slot) for slot in changed}


def parse_snapshot(data):
    fields = Fields(data)
    need(fields.number(2) == 1, "version of a snapshot record")
    has_parent = fields.number(1)
    fields.zeros(1, "snapshot record")
    count = fields.number(4)
    need(has_parent <= 1 and count <= 1024, "snapshot record")
    images, before = {}, (0, -1)
    for _ in range(count):
        role, splitter, disk = fields.number(1), fields.number(1), fields.number(2)
        fields.zeros(4, "image")
        length, root = fields.number(8), fields.take(32)
        need(role in ROLES and before < (role, disk), "order of the images")
        need(role == 2 or disk == 0, "disk number of what is no disk")
        before = (role, disk)
        name = ROLES[role] + (str(disk) if role == 2 else "")
        images[name] = (splitter, length, root)
    parent = fields.take(32)
    need(has_parent or not any(parent), "parent")
    fields.counted(256 << 10, "config")
    fields.end("snapshot record")
    return images, parent if has_parent else None


def parse_event(data):
    fields = Fields(data)
    need(fields.number(2) == 1, "version of an event")
    kind = fields.number(1)
    fields.zeros(1, "event")
    time, snapshot = fields.number(8), fields.take(32)
    name = fields.counted(1024, "name").decode()
    new_bytes, labels = fields.number(8), fields.number(4)
    need(COMMIT <= kind <= DROP and labels <= 64, "event")
    for _ in range(labels):
        fields.counted(PLAIN_MAX, "label")
        fields.counted(PLAIN_MAX, "label")
    fields.end("event")
    return kind, time, snapshot, name, new_bytes


class Pack:
    """One pack: its frames and the keys in them, from its tables."""

    def __init__(self, path, number):
        self.path, self.number = path, number
        with open(path, "rb") as file:
            self.data = file.read()
        data, name = self.data, os.path.basename(path)
        need(16 + 96 <= len(data) <= PACK_MAX, f"{name}: length")
        need(data[:16] == struct.pack("<8sII", b"CPPACK01", 1, 0), f"{name}: header")
        foot = data[-96:]
        need(foot[:8] == b"CPPKEND1", f"{name}: footer")
        need(checksum("pack footer", foot[:80]) == foot[80:], f"{name}: footer checksum")
        version, zero, pack, frames, entries = struct.unpack_from("<IIQII", foot, 8)
        need((version, zero, pack) == (1, 0, number), f"{name}: footer")
        need(frames <= entries <= ENTRIES_MAX, f"{name}: counts")
        tables_at = len(data) - 96 - 8 * frames - 20 * entries
        need(tables_at >= 16, f"{name}: tables")
        tables = data[tables_at:-96]
        need(checksum("pack tables", tables) == foot[64:80], f"{name}: tables checksum")
        self.content_ok = derived("pack content", data[:tables_at]) == foot[32:64]
        self.frames, at, first = [], 16, 0
        for row in range(frames):
            length, count, kind, zero = struct.unpack_from("<IHBB", tables, 8 * row)
            keys_at = 8 * frames + 20 * first
            keys = [tables[keys_at + 20 * n : keys_at + 20 * (n + 1)] for n in range(count)]
            self.frames.append((at, length, kind, keys))
            at, first = at + length, first + count
        need(at == tables_at and first == entries, f"{name}: frame table")

    def objects(self, frame):
        offset, length, kind, keys = self.frames[frame]
        where = f"{os.path.basename(self.path)} at {offset}"
        found, objects = parse_frame(self.data[offset : offset + length], where)
        need(found == kind and len(objects) == len(keys), f"{where}: frame table")
        return objects


class Store:
    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "FORMAT"), "rb") as file:
            need(file.read(64) == b"coppice store format 1\n", "FORMAT")
        self.packs, self.places, self.cache = {}, {}, (None, None)
        for name in sorted(os.listdir(os.path.join(folder, "packs"))):
            stem, dot, rest = name.partition(".")
            if rest != "pack" or len(stem) != 12 or not stem.isdigit():
                continue
            pack = Pack(os.path.join(folder, "packs", name), int(stem))
            need(0 < pack.number < PACK_ID_LIMIT, f"{name}: pack id")
            self.packs[pack.number] = pack
            for frame, (_, _, _, keys) in enumerate(pack.frames):
                for slot, key in enumerate(keys):
                    self.places[key] = (pack.number, frame, slot)
        self.records, self.names, self.order = {}, {}, []
        self.read_log()

    def read_log(self):
        with open(os.path.join(self.folder, "roots.log"), "rb") as file:
            log = file.read()
        need(log[:16] == struct.pack("<8sII", b"CPROOTS1", 1, 0), "header of the root log")
        at, sequence = 16, 1
        while at < len(log):
            try:
                body, at = self.log_entry(log, at, sequence)
            except Bad:
                need(not self.whole_entry_behind(log, at), f"root log damaged at {at}")
                break
            sequence += 1
            self.replay(body)

    @staticmethod
    def log_entry(log, at, sequence=None):
        head = log[at : at + 48]
        need(len(head) == 48 and head[:4] == b"CPRL", "root log entry")
        length, number, pack, _ = struct.unpack_from("<IQQQ", head, 4)
        need(length <= 1 << 20 and pack <= PACK_ID_LIMIT, "root log entry")
        body = log[at + 48 : at + 48 + length]
        need(len(body) == length, "root log entry")
        need(checksum("root log", head[:32], body) == head[32:48], "root log checksum")
        need(sequence in (None, number), "root log sequence")
        return body, at + 48 + length

    def whole_entry_behind(self, log, at):
        while (at := log.find(b"CPRL", at + 1)) >= 0:
            try:
                self.log_entry(log, at)
                return True
            except Bad:
                continue
        return False

    def replay(self, body):
        fields = Fields(body)
        event, record = fields.counted(1 << 20, "event"), fields.counted(1 << 20, "record")
        fields.end("root log body")
        kind, _, snapshot, name, _ = parse_event(event)
        if kind == COMMIT:
            need(derived("snapshot", record) == snapshot, "id of a snapshot record")
            if snapshot not in self.records:
                self.order.append(snapshot)
            self.records[snapshot] = parse_snapshot(record)
        if kind in (COMMIT, TAG) and name and snapshot in self.records:
            self.names[name] = snapshot
        if kind == UNTAG:
            snapshot = self.names.pop(name, None)
        named = snapshot in self.names.values()
        if kind == DROP or (kind == UNTAG and not named):
            self.names = {n: s for n, s in self.names.items() if s != snapshot}
            if self.records.pop(snapshot, None):
                self.order.remove(snapshot)

    def object(self, key, what):
        need(key in self.places, f"{what} {key.hex()} is in no pack")
        pack, frame, slot = self.places[key]
        if self.cache[0] != (pack, frame):
            self.cache = ((pack, frame), self.packs[pack].objects(frame))
        return self.cache[1][slot]

    def node(self, wanted, depth=8):
        kind, data = self.object(wanted[:20], "node")
        if kind == NODE:
            need(derived("tree node", data) == wanted, "hash of a node")
            return parse_node(data)
        need(kind == PATCH and depth > 0, "a node is something else")
        own, base, changes = parse_patch(data)
        need(own == wanted, "id of a patch")
        level, children = self.node(base, depth - 1)
        children = {slot: child for slot, child in children.items() if slot not in changes}
        children |= {slot: child for slot, child in changes.items() if child}
        need(derived("tree node", encode_node(level, children)) == wanted, "hash of a patched node")
        return level, children

    def pages(self, image):
        """All pages of an image that are not zero: (number, bytes)."""
        splitter, length, root = image
        kind, record = self.object(root[:20], "root")
        need(kind == ROOT and derived("image root", record) == root, "hash of a root")
        found, level, has_top, length_too = record[0], record[1], record[2], record[8:16]
        need(len(record) == 48 and not any(record[3:8]), "root record")
        need(found == splitter == 0, "splitter")
        need(int.from_bytes(length_too, "little") == length <= IMAGE_MAX, "length of an image")
        count, expected = -(-length // PAGE), 0
        while 128 ** (expected + 1) < count:
            expected += 1
        need(level == expected and has_top <= 1, "level of the top node")
        if has_top:
            yield from self.under(record[16:], level, 0, count)
        else:
            need(not any(record[16:]), "root record without a top node")

    def under(self, wanted, level, first, count):
        found, children = self.node(wanted)
        need(found == level, "level of a node")
        for slot in sorted(children):
            at = first + slot * 128**level
            need(at < count, "a page behind the end")
            if level:
                yield from self.under(children[slot], level - 1, at, count)
            else:
                kind, page = self.object(children[slot][:20], "chunk")
                need(kind is None and derived("chunk", page) == children[slot], "hash of a chunk")
                need(any(page), "a page of zeros is stored")
                yield at, page

    def export(self, name, part, path):
        need(name in self.names, f"there is no snapshot named {name}")
        images, _ = self.records[self.names[name]]
        part = part or next((p for p in ("stream", "disk0") if p in images), "memory")
        need(part in images, f"{name} has no part {part}")
        length = images[part][1]
        with open(path, "xb") as out:
            out.truncate(length)
            for number, page in self.pages(images[part]):
                rest = length - number * PAGE
                need(rest >= PAGE or not any(page[rest:]), "bytes behind the end of the image")
                out.seek(number * PAGE)
                out.write(page[:rest])

    def listing(self):
        names = {}
        for name, snapshot in self.names.items():
            names.setdefault(snapshot, []).append(name)
        return [
            {
                "id": snapshot.hex(),
                "names": sorted(names.get(snapshot, [])),
                "images": {part: image[1] for part, image in self.records[snapshot][0].items()},
                "parent": parent.hex() if (parent := self.records[snapshot][1]) else None,
            }
            for snapshot in self.order
        ]

    def verify(self):
        counts = dict.fromkeys(("packs", "frames", "chunks", "patches", "images", "pages"), 0)
        for pack in self.packs.values():
            counts["packs"] += 1
            need(pack.content_ok, f"{os.path.basename(pack.path)}: content hash")
            for frame, (_, _, kind, keys) in enumerate(pack.frames):
                counts["frames"] += 1
                for key, (what, data) in zip(keys, pack.objects(frame)):
                    need(id_of(what, data)[:20] == key, "an object has another key")
                    counts["chunks"] += kind == PAGES
                    counts["patches"] += what == PATCH
                    parse = {NODE: parse_node, PATCH: parse_patch}
                    parse |= {SNAPSHOT: parse_snapshot, EVENT: parse_event}
                    if what in parse:
                        parse[what](data)
        for images, _ in self.records.values():
            for image in images.values():
                counts["images"] += 1
                counts["pages"] += sum(1 for _ in self.pages(image))
        return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("verify")
    export = commands.add_parser("export")
    export.add_argument("name")
    export.add_argument("file")
    export.add_argument("--part")
    options = parser.parse_args()
    try:
        store = Store(options.store)
        if options.command == "list":
            print(json.dumps(store.listing()))
        elif options.command == "verify":
            print(json.dumps(store.verify()))
        else:
            store.export(options.name, options.part, options.file)
    except (Bad, OSError, zstandard.ZstdError) as error:
        print(f"coppice_reader: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
