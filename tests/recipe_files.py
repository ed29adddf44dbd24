"""Recipe files that are wrong in every way we could think of: mutated trees, texts and bytes, YAML's own traps."""

import copy
import datetime
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

import yaml

from steerlens.recipe import shipped

TREE = {
    "schema": 1,
    "name": "fuzz",
    "model": {"id": "tiny", "revision": None, "layers": 6, "heads": 8},
    "methods": [
        {"method": "pasta", "alpha": 0.1, "heads": {1: [0, 3]}, "scale": "exclude"},
        {"method": "headmask", "heads": "3:7;4:*", "mode": "zero", "phase": "decode"},
        {"method": "act", "beta": 0.4, "threshold": 0.1, "threshold_mode": "absolute", "heads": "all"},
        {"method": "per_row", "methods": [{"method": "zerotuning", "gamma": 2}, None]},
    ],
    "task": "conflict",
    "evidence": {
        "metric": "follows",
        "baseline": 0.51,
        "steered": 0.99,
        "n": 200,
        "interval": [0.46, 0.5],
        "date": "2026-11-20",
    },
}
HEAD = "schema: 1\nname: fuzz\nmodel: {id: tiny}\n"
METHODS = "methods:\n  - {method: zerotuning, gamma: 2}\n"
# what the names in it would run, if the reader ran anything: `touch` in the current folder
CODE = [
    "!!python/object/apply:os.system ['touch executed']",
    "!!python/object/apply:subprocess.check_call [[touch, executed]]",
    '!!python/object/apply:builtins.eval [\'open("executed", "w")\']',
    '!!python/object/apply:builtins.exec {args: [\'open("executed", "w")\']}',
    "!!python/object/new:pathlib.PosixPath [executed]",
    "!!python/object:recipe_bait.Bait {}",
    "!!python/module:recipe_bait",
    "!!python/name:recipe_bait.Bait",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch executed']",
    "!import recipe_bait",
    "${touch executed}",
    "{{ ''.__class__.__mro__ }}",
    "__import__('recipe_bait')",
    "recipe_bait:Bait",
    "recipe_bait.Bait",
    "$(touch executed)",
    "../../../etc/passwd",
    "file:///etc/passwd",
]
HEAD_SPECS = [
    "../../../../etc/passwd.json:top3",
    "/etc/passwd",
    "/dev/zero.json:top1",
    "/proc/self/environ.json",
    "~/.netrc.json",
    "file:///etc/hosts.json:top2",
    "http://127.0.0.1:9/x.json:top2",
    "\0.json:top2",
    "..json:top99999999999999999999",
    ".json",
    "0-9999:0-9999",
    "*:0-9999",
    ",".join(["0-9999"] * 500) + ":0",
    "0:" + ",".join(["0-9999"] * 500),
    "0-9999:1;" * 500,
    "9" * 5000 + ":1",
    "1:" + "9" * 5000,
    "1:-1",
    "-1:1",
    "²:³",
    "٣:٧",
    ":",
    ";;;",
    "1:1:1",
    "all,all",
]
ESCAPES = ["UFFFFFFFF", "U00110000", "ud800", "udc80", "x0", "0", "e[2J", "n", "z"]
ODD_VALUES = [
    *(0, -1, 2**63, 10**400, -0.0, 1e300, float("nan"), float("inf"), -float("inf"), True, None, 1j),
    *(
        "",
        " ",
        "\0",
        "\x1b[31m",
        "\u2028",
        "\ufeff",
        "é" * 50,
        "x" * 3000,
        "1e999",
        "1_000",
        "0x10",
        "0o7",
        "no",
        "3:17",
    ),
    *([], {}, [[]], [None], {"": {}}, {None: None}, {1.5: 2}, [[[[[[]]]]]], (1, 2), {1, 2}, b"\xff\x00", [0] * 300),
    *(datetime.date(2026, 11, 20), datetime.datetime(2026, 11, 20, 1, 2, 3), PurePosixPath("/etc"), os.system, int),
    *CODE[10:],
    *HEAD_SPECS,
]
ODD_KEYS = [
    *(
        "",
        " ",
        "<<",
        "<",
        "<text>",
        "<measured>",
        "=",
        "~",
        "null",
        "true",
        "1",
        "\0",
        "\x1b[2J",
        "\n",
        "k" * 3000,
        "ключ",
    ),
    *(
        "Schema",
        "methods ",
        "methds",
        "model.id",
        "__class__",
        "__init__",
        "model_config",
        "version",
        "method",
        "heads",
    ),
    *(0, 1, -1, 1.5, None, True, float("nan"), 10**300, datetime.date(2026, 1, 1)),
]
FRAGMENTS = [
    *(
        ": ",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\n",
        "\r",
        "\t",
        "\t- ",
        '"',
        "'",
        "#",
        " #",
        "|",
        ">",
        "|+\n",
        ">-\n",
    ),
    *(
        "&a ",
        "*a",
        "!!int ",
        "!!set ",
        "!x ",
        "!",
        "%",
        "%YAML 1.2\n",
        "%TAG ! x:\n",
        "---\n",
        "...\n",
        "@",
        "`",
        "\\",
        "<<: ",
    ),
    *(
        "null",
        "~",
        "1e999",
        "-1",
        ".nan",
        "-.inf",
        "0x",
        "true",
        "method",
        "heads",
        "\0",
        "\ufeff",
        "\u0085",
        "\U0001f600",
    ),
    *(
        '"\\UFFFFFFFF"',
        '"\\ud800"',
        '"\\x00"',
        '"\\',
        "'\\'",
        "2026-13-40",
        "12:30:45",
        "0o17",
        "1_0",
        "- - - ",
        "key: [",
        "a" * 300,
    ),
    *CODE,
]


def malformed(seed: int) -> Iterator[bytes]:
    """An endless stream of files, the same for a seed; a few of them happen to be valid."""
    rng = random.Random(seed)
    bases = [text.read_bytes() for text in shipped().values()]
    bases.append(yaml.safe_dump(TREE).encode())
    while True:
        kind = rng.random()
        if kind < 0.4:
            yield _tree(rng)
        elif kind < 0.65:
            yield _text(rng, rng.choice(bases).decode()).encode("utf-8", "surrogatepass")
        elif kind < 0.8:
            yield _bytes(rng, rng.choice(bases))
        else:
            yield _trap(rng).encode("utf-8", "surrogatepass")


def _tree(rng: random.Random) -> bytes:
    tree = copy.deepcopy(TREE)
    for _ in range(rng.randint(1, 3)):
        _mutate(rng, tree)
    if rng.random() < 0.2:
        return json.dumps(tree, default=str, skipkeys=True).encode()
    flow = rng.choice([None, True, False])
    # the unrestricted dumper writes Python tags for what YAML has no type for
    return yaml.dump(tree, Dumper=yaml.Dumper, default_flow_style=flow, allow_unicode=True, sort_keys=False).encode(
        "utf-8", "surrogatepass"
    )


def _mutate(rng: random.Random, tree: dict) -> None:
    node, depth = tree, 0
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and rng.random() < 0.7 and depth < 8:
            node, depth = node[key], depth + 1
            continue
        break
    match rng.randrange(7):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(ODD_KEYS)] = node.pop(key)
        case 2 if isinstance(node, dict):
            node[rng.choice(ODD_KEYS)] = rng.choice(ODD_VALUES)
        case 3:
            node[key] = [node[key]] * rng.choice([1, 2, 60])
        case 4:
            for _ in range(rng.choice([1, 5, 60])):
                node[key] = [node[key]] if rng.random() < 0.5 else {"a": node[key]}
        case 5 if isinstance(node[key], str) and node[key]:
            at = rng.randrange(len(node[key]))
            node[key] = node[key][:at] + rng.choice(["", "x", "\0", " ", node[key][at] * 2]) + node[key][at + 1 :]
        case _:
            node[key] = rng.choice(ODD_VALUES)


def _text(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 5)):
        lines = text.split("\n")
        at, line = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines.insert(rng.randrange(len(lines) + 1), lines[line])
                text = "\n".join(lines)
            case 1:
                lines[line] = rng.choice([" ", "  ", "\t", "- ", "? "]) + lines[line]
                text = "\n".join(lines)
            case 2:
                del lines[line]
                text = "\n".join(lines)
            case _:
                text = text[:at] + rng.choice(FRAGMENTS) + text[at + rng.choice([0, 0, 1, 5, 40]) :]
    return text


def _bytes(rng: random.Random, content: bytes) -> bytes:
    match rng.randrange(7):
        case 0:
            return content.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"]))
        case 1:
            return (
                rng.choice([b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"PK\3\4", b"\x80\4\x95"])
                + content
            )
        case 2:
            return content[: rng.randrange(len(content))]
        case 3:
            return rng.randbytes(rng.randrange(1, 400))
        case _:
            changed = bytearray(content)
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(changed))
                match rng.randrange(3):
                    case 0:
                        changed[at] ^= 1 << rng.randrange(8)
                    case 1:
                        changed[at:at] = rng.choice([b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1b", b"\x7f", b"\r"])
                    case _:
                        changed[at : at + rng.randrange(30)] = b""
            return bytes(changed)


def _trap(rng: random.Random) -> str:
    many = rng.choice([3, 50, 400, 1200])
    traps = [
        lambda: HEAD + "methods: " + rng.choice(["[", "{a: ", "- ", "? ", "!!seq [", '"', "[{", "&a ["]) * many,
        lambda: HEAD + METHODS + f"task: {rng.choice(CODE)}\n",
        lambda: HEAD + METHODS + f"{rng.choice(CODE)}: x\n",
        lambda: HEAD + f"methods: [{{method: {rng.choice(CODE)}}}]\n",
        lambda: HEAD + f"methods: [{rng.choice(CODE)}]\n",
        lambda: f"{rng.choice(CODE)}\n{HEAD}{METHODS}",
        lambda: HEAD.replace("tiny", rng.choice(CODE)) + METHODS,
        lambda: HEAD + f"methods: [{{method: headmask, heads: {json.dumps(rng.choice(HEAD_SPECS))}}}]\n",
        lambda: (
            HEAD + METHODS.replace("2", rng.choice(["9" * 5000, "-" + "9" * 999, "1e" + "9" * 99, "." + "1" * 999]))
        ),
        lambda: HEAD + METHODS + f"{'k' * many * 10}: 1\n",
        lambda: HEAD + METHODS + f"? {'k' * many * 10}\n: 1\n",
        lambda: HEAD + METHODS + "".join(f"k{i}: 1\n" for i in range(many)),
        lambda: HEAD + METHODS + "task: a\n" * many,
        lambda: HEAD + "methods: [" + rng.choice(["1,", "{},", "{method: x},", "[],", '"",']) * many + "]\n",
        lambda: HEAD + "methods: [" + "{method: per_row, methods: [" * many + "]}" * many + "]\n",
        lambda: "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(many)) + HEAD + METHODS,
        lambda: "base: &base {x: 1}\n" + HEAD + METHODS + "<<: *base\n",
        lambda: "&a {" + "a: *a, " * many + "}",
        lambda: f"%YAML 1.{'9' * many * 5}\n---\n{HEAD}{METHODS}",
        lambda: "---\n".join([HEAD + METHODS] * 3),
        lambda: HEAD + METHODS + 'task: "\\' + rng.choice(ESCAPES) + '"\n',
        lambda: HEAD + METHODS + '"\\' + rng.choice(ESCAPES) + '": 1\n',
        lambda: (
            HEAD + METHODS + "evidence: {date: " + rng.choice(["2026-13-40", "20261120", "now", "1e9", "[]"]) + "}\n"
        ),
        lambda: (
            HEAD
            + METHODS
            + "evidence: "
            + rng.choice(["yes", "published", "published, not reproduced here: ", "[]", "1"])
        ),
        lambda: HEAD + METHODS + "task: " + rng.choice(["|", ">"]) + f"\n{' ' * many}x\n y\n",
        lambda: " " * many + HEAD + METHODS,
        lambda: "\n" * many,
        lambda: HEAD.replace("1", rng.choice(["2", "1.0", "'1'", "true", "01", "1e0", "[1]", "9" * 400])) + METHODS,
    ]
    return rng.choice(traps)()


class Watch:
    """What the interpreter is asked to do between `with`: code to run, modules to load, processes, sockets, writing."""

    NAMES = (
        *("exec", "compile", "import", "marshal.loads", "pickle.find_class", "code.__new__", "ctypes.dlopen"),
        *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "webbrowser.open"),
        *("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.putenv", "shutil.rmtree"),
    )

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)  # there is no way to take it off again

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.on and (event in self.NAMES or (event == "open" and self._writes(arguments))):
            self.seen.append(f"{event} {arguments!r:.200}")

    @staticmethod
    def _writes(arguments: tuple) -> bool:
        _, mode, flags = arguments
        return any(c in (mode or "") for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def __enter__(self) -> "Watch":
        self.on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False
