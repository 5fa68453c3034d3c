"""Ways in which a file gets damaged: bits and lengths, JSON values, safetensors headers, files of another kind."""

import json
import os
import shutil
import struct

from adapter_files import CONFIG, WEIGHTS

NASTY = [
    None, True, False, 0, -1, 1, 2, 3, 2**40, 2**50, 2**63, 10**30, 0.0, -1.5, 0.5, 1e308, 1e-320, "", "x", "0", "up",
    "nan", "re:", "re:(", "re:(a+)+$", "re:(.*)*(.*)*x", "*", "[", "up\0", "é" * 300, "all-linear", [], {}, [[]],
    [None],
    {"x": 1}, ["up"], ["up", "down"], [0], [2**40, 3], [-1, 7], {"method": "lora"}, {"method": "glora", "rank": 1},
    {"A": "lora"}, {"pattern": "up", "parts": 2**40, "select": [0]}, {"pattern": "up", "select": None}, ["up"] * 50,
]  # fmt: skip


# -- bytes -------------------------------------------------------------------------------------------------------
def _flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(data, rng):
    data[rng.randrange(len(data))] = rng.randrange(256)


def _cut(data, rng):
    del data[rng.randrange(len(data)) :]


def _longer(data, rng):
    data += bytes(rng.randrange(256) for _ in range(rng.choice([1, 7, 100])))


def _zeros(data, rng):
    start = rng.randrange(len(data))
    for index in range(start, min(len(data), start + rng.choice([1, 8, 64]))):
        data[index] = 0


def _without(data, rng):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 4, 50])]


def _twice(data, rng):
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice([1, 8, 200])]


def _swapped(data, rng):
    one, other = rng.randrange(len(data)), rng.randrange(len(data))
    data[one], data[other] = data[other], data[one]


BYTES = [_flip, _flip, _byte, _cut, _longer, _zeros, _without, _twice, _swapped]


def damage_bytes(file, rng):
    data = bytearray(file.read_bytes())
    if data:
        rng.choice(BYTES)(data, rng)
    file.write_bytes(data)


# -- JSON --------------------------------------------------------------------------------------------------------
def _places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _change(value, rng):
    """One value, key or entry of a JSON document becomes another, is lost or comes in addition."""
    places = [path for path in _places(value) if path]
    if not places:
        return rng.choice(NASTY)
    *path, last = rng.choice(places)
    holder = value
    for key in path:
        holder = holder[key]
    kind = rng.randrange(6)
    if kind <= 2:
        holder[last] = rng.choice(NASTY)
    elif kind == 3:
        del holder[last]
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "r", "method", "é", f"{last}x"])] = holder.pop(last)
    elif isinstance(holder, dict):
        holder[rng.choice(["x", "lora_nums", "unshared_r", "rank_pattern", "overrides"])] = rng.choice(NASTY)
    else:
        holder.append(rng.choice(NASTY))
    return value


def damage_json(file, rng):
    text = file.read_text()
    kind = rng.randrange(12)
    if kind == 0:
        text = text.replace("{", "{" + '"a": ' + "[" * 100_000, 1)
    elif kind == 1:
        text = text.replace("1", "1" * rng.choice([50, 5000]), 1)
    elif kind == 2:
        text = "{" + text.strip()[1:-1] + "," + text.strip()[1:]
    elif kind == 3:
        file.write_bytes(text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])))
        return
    elif kind == 4:
        text = text.replace("2", rng.choice(["NaN", "Infinity", "-Infinity", "1e999"]), 1)
    elif kind == 5:
        text = rng.choice(["", " ", "null", "[]", "1", '"x"', "{}", "\0"])
    else:
        text = json.dumps(_change(json.loads(text), rng))
    file.write_text(text)


# -- safetensors -------------------------------------------------------------------------------------------------
def damage_header(file, rng):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    kind = rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(["F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64", "I32", "U32", "C64", "X", 3])
    elif kind == 1:
        shape = entry["shape"]
        entry["shape"] = rng.choice([[], [0], [2**40], [-1, 2], ["x"], None, shape[::-1], [1, *shape]])
    elif kind == 2:
        entry["data_offsets"] = rng.choice([[0, 0], [5, 1], [0, 2**50], [-4, 4], None, entry["data_offsets"] * 2])
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[rng.choice(["x", "", "\0", name + "x", name.upper()])] = header.pop(name)
    elif kind == 5:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == 6:
        header["__metadata__"] = rng.choice([None, {}, {"format": 3}, {"format": "tf"}, [], {"fxgraft.config": "{}"}])
    elif kind == 7:
        _change(header.get("__metadata__") or {"format": "pt"}, rng)
    else:
        header.update({f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)})
    text = json.dumps(header).encode()
    length = len(text) if rng.randrange(12) else rng.choice([0, 2**63, len(data) * 2, 2**31])
    file.write_bytes(struct.pack("<Q", length) + text + rest)


# -- files -------------------------------------------------------------------------------------------------------
def damage_place(file, rng):
    """Something else stands where the file was."""
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)
    elif kind == 3:
        file.symlink_to("/dev/zero")
    elif kind == 4:
        file.symlink_to(file.parent / "nowhere")


def damage_folder(folder, others, rng):
    """Damage one folder; `others` are whole folders of which files may come."""
    kind = rng.randrange(12)
    config, weights = folder / CONFIG, folder / WEIGHTS
    if kind < 4:
        damage_json(config, rng)
    elif kind < 6:
        damage_bytes(rng.choice([config, weights]), rng)
    elif kind < 8:
        damage_bytes(weights, rng)
    elif kind < 10:
        damage_header(weights, rng)
    elif kind == 10:
        name = rng.choice([CONFIG, WEIGHTS])
        shutil.copy(rng.choice(others) / name, folder / name)
    else:
        damage_place(rng.choice([config, weights]), rng)
