"""Seeded damage to files: bits and bytes of any format, and the fields of those whose structure is known."""

import ast
import gzip
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

ABSURD = (
    *(0, -1, 1, 2, 127, 128, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**18, 10**30, -(2**63), -(10**18)),
)
DEPTHS = (3, 60, 400, 3000, 100_000)
NESTED = "\uffffnested"
VALUES: tuple[Any, ...] = (
    *ABSURD,
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-308, 0.5, True, False, None),
    *(
        "",
        "x",
        "x" * 5000,
        "\0",
        "../../x",
        "/etc/passwd",
        "<b>\n\r\u2028",
        "\ud800",
        "9" * 5000,
        "F64",
        "nan",
    ),
    *([], {}, [[]], [None], {"": None}, [0] * 3000, NESTED, NESTED, NESTED),
)
WORDS = (
    *("", "nan", "inf", "-inf", "1e400", "-1", "0", "1e-400", "9" * 5000, "1_000", "0x10", "٣", "²", "1e18"),
    *(
        '"',
        '""',
        '"a',
        "a\nb",
        "\0",
        "\r",
        "\u2028",
        "é" * 300,
        "x" * 3000,
        "null",
        "true",
        "[",
        "[0, 1",
        ",",
        ";",
    ),
    *(
        "18446744073709551616",
        "-9223372036854775809",
        "[" * 3000,
        "[1e999]",
        "None",
        "<script>",
        "1.5",
        "# ",
        "\t",
    ),
)
INVALID = (
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc0\x80",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\0",
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path(self.place),)


def place(random: Random, length: int) -> int:
    """Return a place in a content, more often near one of its ends, where formats keep their tables."""
    near = random.choice((length, length, 16, 64, 256))
    at = random.randrange(min(near, length) + 1)
    return at if random.random() < 0.6 else length - at


def flip(random: Random, content: bytes) -> bytes:
    if not content:
        return content
    made = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8, 64))):
        made[place(random, len(made) - 1)] ^= 1 << random.randrange(8)
    return bytes(made)


def put(random: Random, content: bytes) -> bytes:
    at, new = place(random, len(content)), random.randbytes(random.choice((1, 2, 4, 8, 30)))
    return content[:at] + new + content[at + len(new) :]


def insert(random: Random, content: bytes) -> bytes:
    at = place(random, len(content))
    new = random.choice((*INVALID, random.randbytes(random.choice((1, 4, 40))), b"\0" * 300, b"\n" * 300))
    return content[:at] + new + content[at:]


def remove(random: Random, content: bytes) -> bytes:
    at = place(random, len(content))
    return content[:at] + content[at + random.choice((1, 2, 4, 16, 100)) :]


def cut(random: Random, content: bytes) -> bytes:
    return content[: place(random, len(content))]


def splice(random: Random, content: bytes) -> bytes:
    """Move a stretch of a content to another place."""
    start, to = place(random, len(content)), place(random, len(content))
    stretch = content[start : start + random.choice((1, 8, 64, 1000))]
    return content[:to] + stretch * random.choice((1, 1, 1, 2, 100)) + content[to:]


def integer(random: Random, content: bytes) -> bytes:
    """Write an absurd number over some bytes, as a field of a header may be."""
    at, width = place(random, len(content)), random.choice((1, 2, 4, 8))
    value = random.choice(ABSURD) % 2 ** (8 * width)
    return content[:at] + value.to_bytes(width, random.choice(("little", "big"))) + content[at + width :]


def digits(random: Random, content: bytes) -> bytes:
    """Replace a written number by another."""
    found = list(re.finditer(rb"[0-9]+(\.[0-9]+)?", content[:100_000]))
    if not found:
        return insert(random, content)
    match = random.choice(found)
    value = random.choice((*map(str, ABSURD), "NaN", "1e400", "", "-0", "1.5", "9" * 5000, "null", "true"))
    return content[: match.start()] + value.encode() + content[match.end() :]


def anything(random: Random, content: bytes) -> bytes:
    return random.choice(
        (b"", b"\0" * 200, random.randbytes(200), content[:8] + random.randbytes(200), content * 2)
    )


BYTES: tuple[Mutation, ...] = (
    flip,
    flip,
    put,
    insert,
    remove,
    cut,
    splice,
    integer,
    integer,
    digits,
    anything,
)


def lines(random: Random, content: bytes) -> bytes:
    """Repeat, drop, exchange or lengthen lines."""
    parts = content.splitlines(keepends=True) or [b""]
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    how = random.randrange(6)
    if how == 0:
        parts[at] *= random.choice((2, 3, 30, 300))
    elif how == 1:
        del parts[at]
    elif how == 2:
        parts[at], parts[other] = parts[other], parts[at]
    elif how == 3:
        parts[at] = parts[at].rstrip(b"\r\n") * random.choice((2, 50, 500)) + b"\n"
    elif how == 4:
        parts[at] = parts[at].replace(
            b"\n", random.choice((b"\r", b"\r\n", b"", b"\n\n", b"\0\n", b"\x0c", b"\x85"))
        )
    else:
        parts.insert(at, parts[other])
    return b"".join(parts)


def cells(random: Random, content: bytes) -> bytes:
    """Exchange cells of a table for hostile ones, or repeat a column many times."""
    parts = content.splitlines(keepends=True) or [b""]
    mark = random.choice((b",", b",", b",", b";", b"\t"))
    if random.random() < 0.1:
        times = random.choice((2, 40, 1000))
        parts = [
            line.rstrip(b"\n") + (mark + line.split(mark)[0].strip()) * times + b"\n" for line in parts[:20]
        ]
        return b"".join(parts)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(parts))
        row = parts[at].split(mark)
        column = random.randrange(len(row))
        if random.random() < 0.2:
            parts = [_with(line, mark, column, random) for line in parts]
        else:
            parts[at] = _with(parts[at], mark, column, random)
    return b"".join(parts)


def _with(line: bytes, mark: bytes, column: int, random: Random) -> bytes:
    row = line.split(mark)
    if column < len(row):
        end = b"\n" if row[column].endswith(b"\n") else b""
        row[column] = random.choice(WORDS).encode("utf-8", "replace") + end
    return mark.join(row)


def words(random: Random, content: bytes) -> bytes:
    """Exchange a word between spaces, commas or quotation marks for a hostile one."""
    found = list(re.finditer(rb"[^\s,\"]+", content[:100_000]))
    if not found:
        return insert(random, content)
    match = random.choice(found)
    return content[: match.start()] + random.choice(WORDS).encode("utf-8", "replace") + content[match.end() :]


def fields(random: Random, content: bytes) -> bytes:
    """Change, drop, rename, repeat or nest values of a JSON text, or of a line of JSON lines."""
    try:
        found = json.loads(content)
    except ValueError:
        parts = content.splitlines(keepends=True)
        at = random.randrange(len(parts)) if parts else 0
        if len(parts) < 2:
            return digits(random, content)
        try:
            json.loads(parts[at])
        except ValueError:
            return words(random, content)
        return b"".join(
            [*parts[:at], fields(random, parts[at]).replace(b"\n", b" ") + b"\n", *parts[at + 1 :]]
        )
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        found = _altered(random, found)
    text = json.dumps(found, ensure_ascii=random.random() < 0.5)
    if f"{NESTED}" in text or "\\uffffnested" in text:
        depth, (left, right) = random.choice(DEPTHS), random.choice((("[", "]"), ('{"a":', "}"), ("[", "")))
        nest = left * depth + "0" + right * depth
        text = text.replace(f'"{NESTED}"', nest, 1).replace('"\\uffffnested"', nest, 1)
    if random.random() < 0.15 and (keys := list(re.finditer(r'"([^"\\]{1,40})": ', text))):
        match = random.choice(keys)
        again = json.dumps(random.choice((*ABSURD[:8], [], "x", {}, None)))
        text = f"{text[: match.start()]}{match[0]}{again}, {text[match.start() :]}"
    return text.encode("utf-8", "surrogatepass")


def _altered(random: Random, value: Any) -> Any:
    """Return a value of JSON with one of its parts changed."""
    if isinstance(value, dict) and value and random.random() < 0.92:
        key = random.choice(list(value))
        how = random.random()
        made = dict(value)
        if how < 0.07:
            del made[key]
        elif how < 0.12:
            made[random.choice(("", "x" * 3000, "\0", "__metadata__", key + "/", key.upper()))] = made.pop(
                key
            )
        elif how < 0.16:
            made |= {f"{key}{number}": made[key] for number in range(random.choice((1, 5, 40)))}
        else:
            made[key] = _altered(random, made[key])
        return made
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        if random.random() < 0.1:
            return value[:at] + value[at + 1 :] if random.random() < 0.5 else value * 2
        return [*value[:at], _altered(random, value[at]), *value[at + 1 :]]
    return random.choice(VALUES)


def safetensors(random: Random, content: bytes) -> bytes:
    """Change the table of contents of a safetensors file, its length, or what follows."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    how = random.random()
    if how < 0.7:
        header = fields(random, header)
    elif how < 0.8:
        header = digits(random, header)
    elif how < 0.85:
        data = random.choice((b"", data[:-1], data + b"\0", data * 2))
    else:
        header = random.choice(BYTES)(random, header)
    said = len(header) if random.random() < 0.85 else random.choice(ABSURD) % 2**64
    return said.to_bytes(8, "little") + header + data


DESCRS = (
    *(
        "'<f8'",
        "'<f4'",
        "'<f2'",
        "'>f8'",
        "'<i8'",
        "'>i4'",
        "'|u1'",
        "'<u8'",
        "'|b1'",
        "'<c16'",
        "'|O'",
        "'<U5'",
    ),
    *("'<U1000000000'", "'|S0'", "'|V0'", "'|V8'", "'<M8[s]'", "'<f16'", "[('a', '<f8')]", "[('a', '|O')]"),
    *("'<f8', '<f8'", "('<f8', (10**9,))", "'<U0'", "'x'", "''", "None", "0", "'<m8[10000000000000000000Y]'"),
    *("[('a', '<f8', (1000000000000,))]", "'<T'", "'<f3'", "[]", "{'names': [], 'formats': []}"),
)
SHAPES = (
    *(
        "()",
        "(0,)",
        "(1,)",
        "(3,)",
        "(-1,)",
        "(1000000000000000000,)",
        "(10**18,)",
        "(0, 1000000000000000000)",
    ),
    *(
        "(4294967296, 4294967296)",
        "(2305843009213693952,)",
        "(1,)*70",
        "None",
        "[3]",
        "(1.5,)",
        "(True,)",
        "('3',)",
    ),
    *(
        "(99999999999999999999999,)",
        "(" + "1, " * 70 + ")",
        "(1, 1, 1, 1)",
        "(1, 3, 1, 1)",
        "(300000000,)",
        "(3, 0)",
    ),
)


def npy(random: Random, content: bytes) -> bytes:
    """Change the header of a .npy file: type, shape, order, version, length; or make it one of objects."""
    if len(content) < 10 or not content.startswith(b"\x93NUMPY"):
        return random.choice(BYTES)(random, content)
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    how = random.randrange(10)
    if how < 3:
        header = re.sub(r"'shape': \(.*?\)", lambda _: "'shape': " + _shape(random, header), header)
    elif how < 5:
        header = re.sub(r"'descr': (\[.*?\]|'.*?')", lambda _: f"'descr': {random.choice(DESCRS)}", header)
    elif how == 5:
        header = header.replace("False", random.choice(("True", "0", "None", "'x'", "[" * 90 + "]" * 90)))
    elif how == 6:
        header = digits(random, header.encode()).decode("latin1")
    elif how == 7:
        header, data = re.sub(r"'descr': '.*?'", "'descr': '|O'", header), pickle.dumps([Bomb(CANARY)])
    elif how == 8:
        header = random.choice(BYTES)(random, header.encode("latin1")).decode("latin1")
    else:
        data = random.choice(
            (b"", data[:-1], data + b"\0", data * 3, random.randbytes(len(data)), b"\xff" * len(data))
        )
    version = random.choice((b"\1\0",) * 8 + (b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"))
    raw = header.encode("latin1", "replace")
    said = len(raw) if random.random() < 0.95 else random.choice(ABSURD)
    width = 4 if version > b"\1\0" else 2
    return b"\x93NUMPY" + version + (said % 2 ** (8 * width)).to_bytes(width, "little") + raw + data


def _shape(random: Random, header: str) -> str:
    if random.random() < 0.5:
        return random.choice(SHAPES)
    found = re.search(r"'shape': (\(.*?\))", header)
    try:
        shape = list(ast.literal_eval(found[1]) if found else (1,)) or [1]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        shape = [1]
    shape[random.randrange(len(shape))] = random.choice(ABSURD)
    return f"({', '.join(map(str, shape))},)"


CANARY = "/dev/shm/gramian-fuzz-exploded"
"""What a bomb makes when it goes off."""

HOSTILE = ("/etc/passwd", "../../x.npy", "a/../../x", "\0", "x" * 3000, "C:\\x", "..", "", "x.npy/", "X.npy")
KINDS = (*[zipfile.ZIP_STORED] * 10, *[zipfile.ZIP_DEFLATED] * 10, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
ZEROS = 40 * 2**20, 12 * 2**20


def _npy_bomb(shape: str, descr: str, size: int) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(size)


BOMBS = tuple(
    _npy_bomb(shape, descr, size)
    for size in ZEROS
    for shape, descr in (
        (f"({size},)", "|u1"),
        (f"({size // 4}, 4)", "|b1"),
        (f"({size // 64}, 1, 8, 8)", "|u1"),
    )
)


def repacked(inner: Mutation) -> Mutation:
    """Return what changes a member of a zip archive, and sometimes its name, its kind or its neighbours."""

    def mutate(random: Random, content: bytes) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        except Exception:  # damaged by an earlier mutation
            return random.choice(BYTES)(random, content)
        if not members:
            return content
        at, how = random.randrange(len(members)), random.random()
        name, data = members[at]
        if how < 0.7:
            members[at] = (name, inner(random, data))
        elif how < 0.75:
            del members[at]
        elif how < 0.8:
            members[at] = (random.choice(HOSTILE), data)
        elif how < 0.85:
            members.append((random.choice(HOSTILE), data))
        elif how < 0.9:
            members.append((name, inner(random, data)))
        elif how < 0.9005:
            members[at] = (name, random.choice(BOMBS))
        else:
            other = random.randrange(len(members))
            members[at], members[other] = (name, members[other][1]), (members[other][0], data)
        return _zip(random, members)

    return mutate


def _zip(random: Random, members: Sequence[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    large = any(len(data) > 2**20 for _, data in members)
    kind = zipfile.ZIP_DEFLATED if large else random.choice(KINDS)
    with zipfile.ZipFile(stream, "w", kind, compresslevel=9 if large else 1) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name or "x")
            info.filename = name or "x"
            info.compress_type = kind
            if random.random() < 0.02:
                info.external_attr = 0o120777 << 16  # a symbolic link
            if kind == zipfile.ZIP_STORED:  # as torch.save aligns, without which little is accepted
                info.extra = b"FB" + (room := (-stream.tell() - 34 - len(info.filename)) % 64).to_bytes(
                    2, "little"
                )
                info.extra += bytes(room)
            archive.NameToInfo.pop(info.filename, None)  # a name may come twice
            archive.writestr(info, data)
    made = bytearray(stream.getvalue())
    if random.random() < 0.1:  # sizes and offsets of the central directory
        found = [match.start() for match in re.finditer(b"PK\1\2", bytes(made))]
        entry = random.choice(found)
        offset, width = random.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)))
        value = random.choice(ABSURD) % 2 ** (8 * width)
        made[entry + offset : entry + offset + width] = value.to_bytes(width, "little")
    return bytes(made)


def gzipped(inner: Sequence[Mutation]) -> Mutation:
    """Return what changes a gzip file within, with a right checksum, or makes it a bomb."""

    def mutate(random: Random, content: bytes) -> bytes:
        if random.random() < 0.0005:
            return _gzip_bomb(random.choice((b"\0", b"C\n", b"\0\0\x08\x01\x7f\xff\xff\xff", b",")))
        try:
            plain = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return random.choice(BYTES)(random, content)
        return gzip.compress(random.choice(inner)(random, plain), 1, mtime=0)

    return mutate


_bombs: dict[bytes, bytes] = {}


def _gzip_bomb(unit: bytes) -> bytes:
    if unit not in _bombs:
        packer, piece = zlib.compressobj(9, wbits=31), unit * (2**20 // len(unit))
        _bombs[unit] = b"".join([*(packer.compress(piece) for _ in range(56)), packer.flush()])
    return _bombs[unit]


def pickled(random: Random, content: bytes) -> bytes:
    """Change numbers, names and opcodes of a pickle that torch.save wrote, or exchange it for a bomb."""
    how = random.random()
    if how < 0.05:
        return pickle.dumps({"a": Bomb(CANARY)}, 2)
    if how < 0.1:
        return pickle.dumps(random.choice(VALUES[:-4]), 2)
    if how < 0.5:  # BININT1, BININT2, BININT: sizes, strides, offsets
        found = [match.start() for match in re.finditer(rb"[KMJ]", content)]
        at = random.choice(found or [0])
        width = {75: 1, 77: 2, 74: 4}.get(content[at] if content else 0, 1)
        if random.random() < 0.5:
            big = (
                struct.pack("<bB", -118, 8)[:1]
                + b"\x08"
                + (random.choice(ABSURD) % 2**63).to_bytes(8, "little")
            )
            return content[:at] + big + content[at + 1 + width :]  # LONG1
        return content[: at + 1] + random.randbytes(width) + content[at + 1 + width :]
    if how < 0.65:
        names = (
            b"cos\nsystem\n",
            b"cbuiltins\neval\n",
            b"ctorch\nload\n",
            b"ctorch._utils\n_rebuild_parameter\n",
        )
        found = list(re.finditer(rb"c[\w.]+\n[\w.]+\n", content))
        if found:
            match = random.choice(found)
            return content[: match.start()] + random.choice(names) + content[match.end() :]
    if how < 0.75:
        return re.sub(
            rb"FloatStorage|LongStorage|DoubleStorage",
            random.choice(
                (b"DoubleStorage", b"ByteStorage", b"ComplexDoubleStorage", b"QInt8Storage", b"xStorage")
            ),
            content,
        )
    return random.choice(BYTES)(random, content)


SMILES = (
    *("(", ")", "(" * 60 + ")" * 60, "C" * 2000, "(C" * 400 + ")" * 400, "C(" * 3000 + "C" + ")" * 3000),
    *(
        "[999999999999C]",
        "[C+99999999]",
        "[H]",
        "[Og]",
        "*",
        "$",
        "->",
        "[C@@@@H]",
        ".",
        "~",
        ">>",
        "|c:1|",
        "{",
    ),
    *(
        "%99",
        "%(100000)",
        "C1CC1",
        "c1ccccc1" * 300,
        "[*:999999]",
        "[2H]",
        "[C@TH2]",
        "[Fe@OH30]",
        "\\",
        "/",
        "\0",
    ),
    *(
        "C12345C12345",
        "[Xx]",
        "[C:99999999999999]",
        "[#300]",
        "[#6]",
        "=" * 10,
        "[nH]",
        "c1cc2c1cc2",
        "F" * 30,
        "[C",
    ),
)


def smiles(random: Random, content: bytes) -> bytes:
    """Put hostile pieces of SMILES in."""
    at = place(random, len(content))
    return content[:at] + random.choice(SMILES).encode() + content[at + random.choice((0, 0, 1, 3)) :]


VRS = (
    b"OB",
    b"OW",
    b"US",
    b"SS",
    b"DS",
    b"IS",
    b"UI",
    b"SQ",
    b"UN",
    b"FD",
    b"AT",
    b"PN",
    b"UT",
    b"XX",
    b"LO",
    b"OF",
)


def elements(table: Sequence[tuple[int, int, int, int]]) -> Mutation:
    """Return what changes elements of a DICOM file: (start, place and width of the length, end) of each."""

    def mutate(random: Random, content: bytes) -> bytes:
        start, at, width, end = random.choice(table)
        how = random.randrange(7)
        if how == 0:
            value = random.choice((*ABSURD, 0xFFFFFFFF, end - at - width + 1)) % 2 ** (8 * width)
            return content[:at] + value.to_bytes(width, "little") + content[at + width :]
        if how == 1:
            return content[: start + 4] + random.choice(VRS) + content[start + 6 :]
        if how == 2:
            return content[:start] + content[end:]
        if how == 3:
            return content[:end] + content[start:end] * random.choice((1, 3, 300)) + content[end:]
        if how == 4:
            nest = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
            return content[:start] + nest * random.choice((1, 30, 500, 5000)) + content[start:]
        body = end - at - width
        if how == 5:
            new = random.choice(
                (b"9" * body, b"-1e400", b"nan", b"\\" * body, b"1\\2\\3", b"\xff" * body, b"", b"0")
            )
        else:
            new = (random.choice(ABSURD) % 256 ** max(body, 1)).to_bytes(max(body, 1), "little")
        new = new[: 2**16 - 2].ljust(2 * ((len(new) + 1) // 2), b" ")
        return content[:at] + (len(new) % 2 ** (8 * width)).to_bytes(width, "little") + new + content[end:]

    return mutate
