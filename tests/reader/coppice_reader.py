#!/usr/bin/env python3
"""Reads a Coppice store by docs/format.md alone, without its index.

    coppice_reader.py STORE list               snapshots as JSON
    coppice_reader.py STORE verify             every pack, frame, object and entry
    coppice_reader.py STORE export NAME FILE [--part disk0|memory|state|stream]
    coppice_reader.py STORE root NAME          root of a byte stream, from its bytes alone

Nothing is believed before its checksum or hash was computed. Any difference
from the page ends the program with one line and exit code 1.
"""

import argparse
import hashlib
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
CUT_MIN, CUT_AVERAGE, CUT_MAX = 4096, 16384, 65536
PIECES_MAX = 4096
CHILDREN_MIN, CHILDREN_MAX, ENDS_FROM = 4, 256, 252
ZEROS = bytes(32)
PACK_ID_LIMIT = 1 << 40
ROLES = {1: "memory", 2: "disk", 3: "state", 4: "stream"}
PAGES, OBJECTS, CATALOG, PIECES = 1, 2, 3, 4
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
    need(codec in (0, 1) and PAGES <= kind <= PIECES and cipher == 0, f"{where}: frame header")
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
    if kind == PAGES:
        objects = split_pages(plain, where)
    elif kind == PIECES:
        objects = split_pieces(plain, count, where)
    else:
        objects = split_objects(plain, where)
    need(len(objects) == count, f"{where}: number of objects")
    return kind, objects


def split_pages(plain, where):
    need(len(plain) % PAGE == 0, f"{where}: pages are not whole")
    return [(None, plain[at : at + PAGE]) for at in range(0, len(plain), PAGE)]


def piece_lens(fields, count, where):
    lens = [fields.number(4) for _ in range(count)]
    need(all(1 <= length <= CUT_MAX for length in lens), f"{where}: length of a chunk")
    return lens


def split_pieces(plain, count, where):
    need(count <= PIECES_MAX, f"{where}: number of chunks")
    fields = Fields(plain)
    pieces = [(None, fields.take(n, where)) for n in piece_lens(fields, count, where)]
    fields.end(where)
    return pieces


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


def ends_node(count, last):
    return count == CHILDREN_MAX or (count >= CHILDREN_MIN and last[31] >= ENDS_FROM)


def parse_stream_node(data):
    """Level and children: (id, length) in order."""
    fields = Fields(data)
    level, form, count = fields.number(1), fields.number(1), fields.number(2)
    need(level <= 15 and form == 1 and 1 <= count <= CHILDREN_MAX, "node of a stream")
    children = [(fields.take(32), fields.number(8 if level else 4)) for _ in range(count)]
    fields.end("node of a stream")
    least, most = (1, IMAGE_MAX) if level else (CUT_MIN, CUT_MAX)
    need(all(least <= length <= most for _, length in children[:-1]), "length of a child")
    need(1 <= children[-1][1] <= most, "length of a child")
    early = any(ends_node(n + 1, child) for n, (child, _) in enumerate(children[:-1]))
    need(not early, "a node goes on behind its end")
    return level, children


def encode_stream_node(level, children):
    size = 8 if level else 4
    listed = b"".join(child + length.to_bytes(size, "little") for child, length in children)
    return struct.pack("<BBH", level, 1, len(children)) + listed


def gear():
    digests = (hashlib.md5(bytes([value]) * 64).digest() for value in range(256))
    return [int.from_bytes(digest[:8], "big") for digest in digests]


def cut(data):
    """The lengths of the chunks of a stream."""
    table, at = gear(), 0
    while at < len(data):
        part = data[at : at + CUT_MAX]
        length, value = len(part), 0
        for offset in range(CUT_MIN, length - length % 2):
            value = (2 * value + table[part[offset]]) & 0xFFFFFFFFFFFFFFFF
            mask = 0x0000D90F03530000 if offset < CUT_AVERAGE else 0x0000D90303530000
            if not value & mask:
                length = offset
                break
        yield length
        at += length


def root_of_stream(data):
    at, level, children = 0, 0, []
    for length in cut(data):
        chunk = data[at : at + length]
        children.append((derived("chunk", chunk) if any(chunk) else ZEROS, length))
        at += length
    while children:
        nodes, group = [], []
        for child in children:
            group.append(child)
            if ends_node(len(group), child[0]):
                nodes, group = nodes + [group], []
        nodes += [group] if group else []
        children = [
            (derived("tree node", encode_stream_node(level, node)), sum(n for _, n in node))
            for node in nodes
        ]
        if len(children) == 1:
            break
        level += 1
    head = bytes([1, 0, bool(children), 0, 0, 0, 0, 0]) + len(data).to_bytes(8, "little")
    return derived("image root", head + (children[0][0] if children else ZEROS))


def parse_node(data):
    if data[1:2] == b"\x01":
        return parse_stream_node(data)
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
        version, pieces, pack, frames, entries = struct.unpack_from("<IIQII", foot, 8)
        need((version, pack) == (1, number), f"{name}: footer")
        need(max(frames, pieces) <= entries <= ENTRIES_MAX, f"{name}: counts")
        tables_at = len(data) - 96 - 8 * frames - 20 * entries - 4 * pieces
        need(tables_at >= 16, f"{name}: tables")
        tables = data[tables_at:-96]
        need(checksum("pack tables", tables) == foot[64:80], f"{name}: tables checksum")
        self.content_ok = derived("pack content", data[:tables_at]) == foot[32:64]
        self.frames, at, first = [], 16, 0
        lens, self.lens = Fields(tables[8 * frames + 20 * entries :]), {}
        for row in range(frames):
            length, count, kind, zero = struct.unpack_from("<IHBB", tables, 8 * row)
            keys_at = 8 * frames + 20 * first
            keys = [tables[keys_at + 20 * n : keys_at + 20 * (n + 1)] for n in range(count)]
            if kind == PIECES:
                self.lens[row] = piece_lens(lens, count, name)
            self.frames.append((at, length, kind, keys))
            at, first = at + length, first + count
        need(at == tables_at and first == entries, f"{name}: frame table")
        lens.end(f"{name}: piece table")

    def objects(self, frame):
        offset, length, kind, keys = self.frames[frame]
        where = f"{os.path.basename(self.path)} at {offset}"
        found, objects = parse_frame(self.data[offset : offset + length], where)
        need(found == kind and len(objects) == len(keys), f"{where}: frame table")
        if kind == PIECES:
            lens = [len(data) for _, data in objects]
            need(lens == self.lens[frame], f"{where}: piece table")
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

    def root(self, image):
        """Level and id of the top node, or nothing instead of the id."""
        splitter, length, root = image
        kind, record = self.object(root[:20], "root")
        need(kind == ROOT and derived("image root", record) == root, "hash of a root")
        found, level, has_top, length_too = record[0], record[1], record[2], record[8:16]
        need(len(record) == 48 and not any(record[3:8]), "root record")
        need(found == splitter <= 1, "splitter")
        need(int.from_bytes(length_too, "little") == length <= IMAGE_MAX, "length of an image")
        need(has_top == 1 or not any(record[16:]), "root record without a top node")
        need(has_top <= 1, "root record")
        return level, record[16:] if has_top else None

    def data(self, image):
        """All parts of an image that are not zero: (offset, bytes)."""
        if image[0] == 1:
            yield from self.stream(image)
            return
        length = image[1]
        for number, page in self.pages(image):
            rest = length - number * PAGE
            need(rest >= PAGE or not any(page[rest:]), "bytes behind the end of the image")
            yield number * PAGE, page[:rest]

    def stream(self, image):
        length = image[1]
        level, top = self.root(image)
        need(level == 0 and (top is not None) == (length > 0), "root record of a stream")
        if top is None:
            return
        level, children = self.stream_node(top)
        need(level == 0 or len(children) > 1, "a node above the top node")
        yield from self.under_stream(top, level, 0, length, True)

    def stream_node(self, wanted):
        kind, data = self.object(wanted[:20], "node")
        need(kind == NODE and derived("tree node", data) == wanted, "hash of a node")
        return parse_stream_node(data)

    def under_stream(self, wanted, level, at, length, last):
        found, children = self.stream_node(wanted)
        need(found == level, "level of a node")
        need(sum(covered for _, covered in children) == length, "length of a node")
        ended = ends_node(len(children), children[-1][0])
        need(last or (ended and (level or children[-1][1] >= CUT_MIN)), "end of a node")
        for number, (child, covered) in enumerate(children):
            if level:
                is_last = last and number + 1 == len(children)
                yield from self.under_stream(child, level - 1, at, covered, is_last)
            elif child != ZEROS:
                kind, chunk = self.object(child[:20], "chunk")
                need(kind is None and derived("chunk", chunk) == child, "hash of a chunk")
                need(len(chunk) == covered and any(chunk), "length of a chunk, or zeros")
                yield at, chunk
            at += covered

    def pages(self, image):
        """All pages of an image that are not zero: (number, bytes)."""
        length = image[1]
        level, top = self.root(image)
        count, expected = -(-length // PAGE), 0
        while 128 ** (expected + 1) < count:
            expected += 1
        need(level == expected, "level of the top node")
        if top is not None:
            yield from self.under(top, level, 0, count)

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
            for offset, data in self.data(images[part]):
                out.seek(offset)
                out.write(data)

    def recut(self, name):
        """The root of a stream, computed from nothing but its bytes."""
        need(name in self.names, f"there is no snapshot named {name}")
        image = self.records[self.names[name]][0].get("stream")
        need(image is not None and image[0] == 1, f"{name} is no stream")
        data = bytearray(image[1])
        for offset, part in self.data(image):
            data[offset : offset + len(part)] = part
        return root_of_stream(bytes(data)).hex()

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
        counts = dict.fromkeys(("packs", "frames", "chunks", "patches", "images", "parts"), 0)
        for pack in self.packs.values():
            counts["packs"] += 1
            need(pack.content_ok, f"{os.path.basename(pack.path)}: content hash")
            for frame, (_, _, kind, keys) in enumerate(pack.frames):
                counts["frames"] += 1
                for key, (what, data) in zip(keys, pack.objects(frame)):
                    need(id_of(what, data)[:20] == key, "an object has another key")
                    counts["chunks"] += kind in (PAGES, PIECES)
                    counts["patches"] += what == PATCH
                    parse = {NODE: parse_node, PATCH: parse_patch}
                    parse |= {SNAPSHOT: parse_snapshot, EVENT: parse_event}
                    if what in parse:
                        parse[what](data)
        for images, _ in self.records.values():
            for image in images.values():
                counts["images"] += 1
                counts["parts"] += sum(1 for _ in self.data(image))
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
    commands.add_parser("root").add_argument("name")
    options = parser.parse_args()
    try:
        store = Store(options.store)
        if options.command == "list":
            print(json.dumps(store.listing()))
        elif options.command == "verify":
            print(json.dumps(store.verify()))
        elif options.command == "root":
            print(json.dumps({"root": store.recut(options.name)}))
        else:
            store.export(options.name, options.part, options.file)
    except (Bad, OSError, zstandard.ZstdError) as error:
        print(f"coppice_reader: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
