#!/usr/bin/env python3
"""The lora adapter format in NumPy: a second implementation of docs/FORMAT.md.

Written from the specification, to test the first one against. It reads
strictly (`read` refuses whatever the rules refuse, and says which rule), writes
the one byte sequence the rules allow, and computes in f64 what the forms of
section 2 of the document make of a weight.

    lora_format.py read FILE...         describe each file as JSON
    lora_format.py rewrite IN OUT...    read and write again
    lora_format.py make OUT_DIR         the test vectors (make_native_fixtures.py)
"""

import base64
import hashlib
import json
import math
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_HEADER, MAX_CONFIG, MAX_NAME = 100_000_000, 32 << 20, 16 << 10
MAX_TENSORS, MAX_DIMENSIONS, MAX_METADATA, MAX_RANK = 1_000_000, 16, 100_000, 65_536
# In the order of F4, with the bits of an element.
DTYPES = dict(BOOL=8, F4=4, F6_E2M3=6, F6_E3M2=6, U8=8, I8=8, F8_E5M2=8, F8_E4M3=8,
              F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, I16=16, U16=16, F16=16, BF16=16,
              I32=32, U32=32, F32=32, C64=64, F64=64, I64=64, U64=64)  # fmt: skip
ORDER = {name: at for at, name in enumerate(DTYPES)}
FLOATS = ("F32", "F16", "BF16")
RULES = {
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt-rank": lambda alpha, rank: alpha / math.sqrt(rank),
    "direct": lambda alpha, rank: alpha,
}
PAIRS = (("lora_A.weight", "lora_B.weight"), ("A", "B"), ("embedding_A", "embedding_B"), ("merged_A", "merged_B"))
ROLES = {"A", "B", "embedding_A", "embedding_B", "merged_A", "merged_B", "rank_gain", "magnitude", "in_magnitude",
         "value", "base", "rows", "indices", "added", "scale"}  # fmt: skip
# Section 7: of each form, slots of alternatives of roles with their shapes. A letter is the same length throughout
# a form; `n?` may be 0; `k+` is a kernel of one to three lengths, `k*` of none to three, `1*` ones, `1k` as many
# ones as the kernel has lengths, `tri` b(b-1)/2, `line` any shape with at most one length that is not 1.
FORMS = {
    "bounded": [[{"A": "r in", "B": "out r", "bound": "1", "norms": "in"}]],
    "butterfly": [[{"generators": "f n b b", "gain": "line"}]],
    "circulant": [[{"kernels": "x y b"}]],
    "experts": [[{"A": "m in", "B": "out m"}]],
    "gain": [[{"gain": "line"}]],
    "grid": [[{"A": "k i r", "B": "k r o"}]],
    "hadamard": [[{"w1a": "out r", "w1b": "r in", "w2a": "out q", "w2b": "q in"},
                  {"t1": "p r k+", "w1a": "p out", "w1b": "r in", "t2": "s q k+", "w2a": "s out", "w2b": "q in"}]],
    "kronecker": [[{"w1": "a b"}, {"w1a": "a r", "w1b": "r b"}],
                  [{"w2": "c d k*"}, {"w2a": "c q", "w2b": "q d"}, {"t2": "s q k+", "w2a": "s c", "w2b": "q d"}]],
    "proportional": [[{"A": "r in k*", "B": "out r 1k"}, {"embedding_A": "r in", "embedding_B": "out r"}]],
    "reflections": [[{"vectors": "in r"}]],
    "rotation": [[{"generators": "n tri"}]],
    "shared": [[{"A": "r x", "B": "y r", "in_gain": "r", "out_gain": "o"}]],
    "sparse": [[{"values": "n?", "indices": "2 n?"}]],
    "tiled": [[{"block": "r c"}, {"bat": "n r r"}]],
    "tucker": [[{"mid": "q r k+", "A": "r in 1*", "B": "out q 1*"}]],
}  # fmt: skip
DECOMPOSED = [{}, {"magnitude": "line"}, {"in_magnitude": "line"}]
# Of each form, the facts that it must have, and those that it may (F33).
FACTS = {
    "experts": (["candidates"], []),
    "gain": (["axis", "stored"], []),
    "grid": (["scaling", "rank"], []),
    "hadamard": (["scaling", "rank"], []),
    "kronecker": (["scaling", "rank"], []),
    "proportional": (["scaling"], []),
    "reflections": (["orthogonal"], []),
    "rotation": (["layer"], ["neumann_terms", "radius"]),
    "shared": (["factors"], []),
    "tucker": (["scaling"], []),
}
FEATURES = {"add", "base", "convolution", "embedding", "in-magnitude", "low-rank", "magnitude", "merged", "rank-gain",
            "replace", "replace-rows", *FORMS}  # fmt: skip
NAMINGS = {"kohya", "diffusers", "comfy", "onetrainer"}
CONFIGURED = {"peft", "diffusers"}
GOLDEN = 0x9E3779B97F4A7C15


class Refused(ValueError):
    """A file that a reader must refuse, with the rule that it breaks."""

    def __init__(self, rule, message):
        super().__init__(f"{rule}: {message}")
        self.rule = rule


def check(condition, rule, message):
    if not condition:
        raise Refused(rule, message)


# ---------------------------------------------------------------- the model


@dataclass
class Tensor:
    dtype: str
    shape: list
    data: bytes

    def values(self):
        """The elements as float32, exactly."""
        if self.dtype == "BF16":
            flat = (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(self.data, {"F16": "<f2", "F32": "<f4"}[self.dtype]).astype("<f4")
        return flat.reshape(self.shape)


def full_name(module, parameter):
    """A parameter's, which may be the model's own."""
    return f"{module}.{parameter}" if module else parameter


def short_name(module, parameter):
    """F13: a component's name where the configuration speaks of it."""
    return module if parameter == "weight" else full_name(module, parameter)


@dataclass
class Component:
    """A low-rank change (F7, F24 to F26, F34 to F36)."""

    module: str
    a: Tensor
    b: Tensor
    alpha: float
    rule: str
    parameter: str = "weight"
    kind: str = ""  # embedding or merged, which the shapes do not tell
    magnitude: Tensor | None = None
    in_magnitude: Tensor | None = None
    rank_gain: Tensor | None = None
    order, form = (3, "low-rank"), "low-rank"

    @property
    def rank(self):
        return self.b.shape[1] if self.kind == "merged" else self.a.shape[0]

    @property
    def scale(self):
        return RULES[self.rule](float(self.alpha), self.rank)

    @property
    def layer(self):
        return self.kind or ("convolution" if 3 <= len(self.a.shape) <= 5 else "linear")

    def gains(self):
        found = {"rank_gain": self.rank_gain, "magnitude": self.magnitude, "in_magnitude": self.in_magnitude}
        return {role: tensor for role, tensor in found.items() if tensor is not None}

    def is_plain(self):
        """F10: what other loaders may apply."""
        return self.parameter == "weight" and not self.kind and not self.gains()

    def depends(self):
        return self.magnitude is not None or self.in_magnitude is not None

    def stored_alpha(self):
        """F9: s·rank, rounded once to f32."""
        with np.errstate(over="ignore"):
            return np.float32(self.scale * self.rank)

    def called(self):
        return short_name(self.module, self.parameter)

    def tensors(self):
        if self.is_plain():
            alpha = Tensor("F32", [], self.stored_alpha().tobytes())
            return {f"{self.module}.lora_A.weight": self.a, f"{self.module}.lora_B.weight": self.b,
                    f"{self.module}.alpha": alpha}  # fmt: skip
        kind = f"{self.kind}_" if self.kind else ""
        roles = {f"{kind}A": self.a, f"{kind}B": self.b} | self.gains()
        name = full_name(self.module, self.parameter)
        return {f"{name}.lora:{role}": tensor for role, tensor in roles.items()}

    def features(self):
        kind = {"linear": "low-rank"}.get(self.layer, self.layer)
        return {kind} | {role.replace("_", "-") for role in self.gains()}

    def apply(self, weight):
        """W' in f64, in the shape in which the base stores it."""
        changed = weight + delta(self).reshape(weight.shape)
        if not self.depends():
            return changed
        # The axis of the features: an embedding stores its inputs first.
        kept = int((self.kind == "embedding") == (self.in_magnitude is None))
        axes = tuple(axis for axis in range(weight.ndim) if axis != kept)
        norm = np.sqrt((changed**2).sum(axis=axes, keepdims=True))
        magnitude = self.in_magnitude if self.magnitude is None else self.magnitude
        return magnitude.values().astype(np.float64).reshape(norm.shape) * (changed / norm)


@dataclass
class OfForm:
    """A change by a form that has roles of its own (F31): its tensors by role, and its facts."""

    module: str
    parameter: str
    label: str  # the form, and of experts the depth
    roles: dict  # of VeRA, A and B too, which components share
    facts: dict

    @property
    def form(self):
        return self.label.split(".")[0]

    @property
    def order(self):
        depth = int(self.label.split(".")[1]) if self.form == "experts" else 0
        return (3 + depth, self.form)

    def depends(self):
        """Whether the change depends on the weight."""
        dependent = {"butterfly", "gain", "proportional", "reflections", "rotation"}
        return self.form in dependent or bool(self.roles.keys() & {"bat", "magnitude", "in_magnitude"})

    def called(self):
        return short_name(self.module, self.parameter)

    def shared(self):
        """The factors that are stored once for all (F51)."""
        return (self.roles["A"], self.roles["B"]) if self.form == "shared" else None

    def tensors(self):
        name = full_name(self.module, self.parameter)
        own = {role for role in self.roles if self.form != "shared" or role not in ("A", "B")}
        return {f"{name}.lora:{self.label}.{role}": self.roles[role] for role in own}

    def features(self):
        return {self.form} | {role.replace("_", "-") for role in self.roles.keys() & {"magnitude", "in_magnitude"}}


@dataclass
class Base:
    """A copy of the parameter as it was before training (F37)."""

    module: str
    parameter: str
    value: Tensor
    order, form = (0, "base"), "base"

    def tensors(self):
        return {f"{full_name(self.module, self.parameter)}.lora:base": self.value}

    def features(self):
        return {"base"}

    def apply(self, weight):
        return self.value.values().astype(np.float64)


@dataclass
class Replaced:
    """The whole parameter (F27)."""

    module: str
    parameter: str
    value: Tensor
    order, form = (1, "replaced"), "replaced"

    def tensors(self):
        return {f"{full_name(self.module, self.parameter)}.lora:value": self.value}

    def features(self):
        return {"replace"}

    def apply(self, weight):
        return self.value.values().astype(np.float64)


@dataclass
class Rows:
    """Some of a parameter's rows (F28)."""

    module: str
    parameter: str
    indices: list
    rows: Tensor
    order, form = (2, "rows"), "rows"

    def tensors(self):
        name = full_name(self.module, self.parameter)
        indices = np.array(self.indices, "<i8").tobytes()
        return {f"{name}.lora:rows": self.rows,
                f"{name}.lora:indices": Tensor("I64", [len(self.indices)], indices)}  # fmt: skip

    def features(self):
        return {"replace-rows"}

    def apply(self, weight):
        changed = weight.copy()
        changed[self.indices] = self.rows.values()
        return changed


@dataclass
class Added:
    """A change in full (F29)."""

    module: str
    parameter: str
    change: Tensor
    scale: float
    order, form = (math.inf, "added"), "added"

    def tensors(self):
        name = full_name(self.module, self.parameter)
        return {f"{name}.lora:added": self.change,
                f"{name}.lora:scale": Tensor("F64", [], struct.pack("<d", self.scale))}  # fmt: skip

    def features(self):
        return {"add"}

    def apply(self, weight):
        return weight + self.scale * self.change.values().astype(np.float64)


def in_order(components):
    """By target, and those of one target as they act."""
    return sorted(components, key=lambda c: (c.module, c.parameter, c.order))


@dataclass
class Adapter:
    components: list
    base: dict = field(default_factory=dict)  # name, revision, fingerprint
    fan_in_fan_out: bool | None = None
    names: str | None = None
    source: dict | None = None
    extensions: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)  # the user's entries
    digest: str = ""
    digest_matches: bool = True


def delta(component):
    """s·B·A in f64 as [out, in] (F7), [out, in·kernel] (F24), [vocabulary, dimension] (F25)."""
    a, b = (t.values().astype(np.float64) for t in (component.a, component.b))
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if component.kind == "merged":
        blocks = zip(np.split(a, len(a) // component.rank), np.split(b, len(a) // component.rank))
        return component.scale * np.concatenate([rows @ columns for columns, rows in blocks])
    if component.rank_gain is not None:
        a = component.rank_gain.values().astype(np.float64)[:, None] * a
    change = component.scale * (b @ a)
    return change.T if component.kind == "embedding" else change


# ---------------------------------------------------------------- JSON


def parse(text, rule, what):
    """JSON as RFC 8259 has it: no NaN, no number beyond f64, no key twice (F2)."""

    def unique(pairs):
        keys = Counter(key for key, _ in pairs)
        twice = [key for key, count in keys.items() if count > 1]
        check(not twice, "F2", f"{what}: the key {twice[:1]} appears twice")
        return dict(pairs)

    def integer(digits):
        value = int(digits)
        return value if digits != "-0" and -(1 << 63) <= value < 1 << 64 else number(digits)

    def number(digits):
        value = float(digits)
        check(math.isfinite(value), rule, f"{what}: {digits} is not a number of f64")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=integer,
                           parse_float=number, parse_constant=number)  # fmt: skip
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(rule, f"{what}: {error}") from None
    return value


def number_text(value):
    """The shortest decimal; plain from 1e-5 up to below 1e16, else d.ddde±x."""
    if isinstance(value, int):
        return str(value)
    sign, digits, exponent = re.fullmatch(
        r"(-?)([\d.]+)e([+-]\d+)", np.format_float_scientific(value, trim="-")
    ).groups()
    digits, point = digits.replace(".", ""), int(exponent) + 1
    if 0 < point <= 16:
        whole = digits[:point].ljust(point, "0")
        return f"{sign}{whole}.{digits[point:] or 0}"
    if -5 < point <= 0:
        return f"{sign}0." + "0" * -point + digits
    return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"


def compact(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{compact(k)}:{compact(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(compact, value)) + "]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- reading


def whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def read_container(path):
    """(tensors by name, metadata, data), or Refused (F1, F2, F6)."""
    raw = Path(path).read_bytes()
    check(len(raw) >= 8, "F1", "shorter than the header's length")
    (length,) = struct.unpack("<Q", raw[:8])
    check(length <= MAX_HEADER, "F1", f"a header of {length} bytes")
    check(8 + length <= len(raw), "F1", "the header ends after the file")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    check(text.startswith(b"{"), "F1", "the header does not begin with {")
    try:
        header = parse(text.decode(), "F1", "the header")
    except UnicodeDecodeError as error:
        raise Refused("F1", f"the header: {error}") from None
    metadata = header.pop("__metadata__", {})
    check(isinstance(metadata, dict), "F1", "__metadata__ is no object")
    check(all(isinstance(v, str) for v in metadata.values()), "F1", "metadata not of strings")
    check(len(metadata) <= MAX_METADATA, "F6", f"{len(metadata)} metadata entries")
    check(len(header) <= MAX_TENSORS, "F6", f"{len(header)} tensors")
    tensors, spans = {}, []
    for name, entry in header.items():
        check(len(name.encode()) <= MAX_NAME, "F6", "a tensor name over 16 KiB")
        check(
            isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
            "F1",
            f"{name}: not dtype, shape and data_offsets",
        )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        check(isinstance(dtype, str) and dtype in DTYPES, "F1", f"{name}: dtype {dtype}")
        for numbers in (shape, offsets):
            check(isinstance(numbers, list) and all(map(whole, numbers)), "F1", f"{name}: {entry}")
        check(len(shape) <= MAX_DIMENSIONS, "F6", f"{name}: {len(shape)} dimensions")
        check(len(offsets) == 2 and offsets[0] <= offsets[1], "F1", f"{name}: {offsets}")
        bits = math.prod(shape) * DTYPES[dtype]
        check(bits == 8 * (offsets[1] - offsets[0]), "F1", f"{name}: size and shape disagree")
        tensors[name] = Tensor(dtype, shape, data[slice(*offsets)])
        spans.append(offsets)
    at = 0
    for start, end in sorted(spans):
        check(start == at, "F1", f"a hole or an overlap at byte {start} of the data")
        at = end
    check(at == len(data), "F1", f"the tensors end at {at}, the data at {len(data)}")
    return tensors, metadata, data


def member(value, name, kind, *, required=False, rule="F3"):
    check(name in value or not required, rule, f"`{name}` is missing")
    found = value.get(name)
    wrong = name in value and (not isinstance(found, kind) or isinstance(found, bool) != (kind is bool))
    check(not wrong, rule, f"`{name}` is {found!r}")
    return found


def closed(value, names, what, rule="F3"):
    """F21 opens only the top level and `base` to members that are not known."""
    check(isinstance(value, dict), rule, f"{what} is no object")
    unknown = value.keys() - set(names)
    check(not unknown, "F21", f"{what}: unknown members {sorted(unknown)}")


def read_scaling(value):
    closed(value, ("alpha", "rule"), "scaling")
    alpha = member(value, "alpha", (int, float), required=True, rule="F12")
    rule = member(value, "rule", str, required=True, rule="F12")
    check(rule in RULES, "F12", f"the rule {rule!r} is not known")
    return float(alpha), rule


def read_fingerprint(value):
    """Whether its algorithm is known."""
    algorithm = member(value, "algorithm", str, required=True, rule="F17")
    if algorithm != "samples-1":
        return False
    closed(value, ("algorithm", "targets"), "fingerprint")
    targets = member(value, "targets", list, required=True, rule="F17")
    check(len(targets) <= 64, "F17", f"{len(targets)} targets")
    for target in targets:
        closed(target, ("target", "dtype", "shape", "values"), "a fingerprint's target")
        member(target, "target", str, required=True, rule="F17")
        check(target.get("dtype") in FLOATS, "F17", f"dtype {target.get('dtype')}")
        shape = member(target, "shape", list, required=True, rule="F17")
        check(all(map(whole, shape)), "F17", f"shape {shape}")
        try:
            samples = base64.b64decode(member(target, "values", str, required=True), validate=True)
        except ValueError:
            samples = b""
        count = 16 if math.prod(shape) else 0
        check(len(samples) == 4 * count, "F17", "values are not 16 f32 in base64")
    return True


LABEL = rf"(experts\.(?:0|[1-9]\d*)|{'|'.join(name for name in FORMS if name != 'experts')})"


def target_of(name):
    """(target, form or "", role) as a tensor's name says it (F8, F10, F31)."""
    plain = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_B\.weight|alpha)", name, re.DOTALL)
    if plain:
        return (plain[1], "weight"), "", plain[2]
    other = re.fullmatch(rf"(?:(.+)\.)?([^.]+)\.lora:(?:{LABEL}\.)?(\w+)", name, re.DOTALL)
    check(other, "F11", f"`{name}` belongs to no component")
    label = other[3] or ""
    form = label.split(".")[0]
    roles = {role for slot in FORMS.get(form, []) for roles in slot for role in roles}
    roles |= set() if form == "experts" else {"magnitude", "in_magnitude"}
    roles -= {"A", "B"} if form == "shared" else set()
    check(other[4] in (roles if label else ROLES), "F11", f"`{name}` belongs to no component")
    check(form != "experts" or int(label[8:]) < 1 << 64, "F11", f"`{name}`: its depth")
    return (other[1] or "", other[2]), label, other[4]


def read_components(tensors, default, scalings, groups):
    """The components, in no particular order. `groups` holds (default facts, facts by name) by form."""
    parts, shared = {}, {}
    for name, tensor in tensors.items():
        factor = re.fullmatch(r"lora:shared\.(0|[1-9]\d*)\.([AB])", name)
        if factor:
            shared.setdefault(int(factor[1]), {})[factor[2]] = tensor
        else:
            target, label, role = target_of(name)
            parts.setdefault(target, {}).setdefault(label, {})[role] = tensor
    factors = {factor for pair in PAIRS for factor in pair}
    scaled = any(roles.get("", {}).keys() & factors for roles in parts.values())
    check(not scaled or default, "F12", "`scaling` is missing")
    check(scaled or not default, "F12", "`scaling`, and nothing is scaled")

    components, scalings = [], dict(scalings)
    groups = {label: (default, dict(named)) for label, (default, named) in groups.items()}
    for (module, parameter), forms in parts.items():
        components += read_bare(module, parameter, forms.pop("", {}), default, scalings)
        for label, roles in forms.items():
            components.append(read_form(module, parameter, label, roles, groups, shared))
    check(not scalings, "F11", "an override without tensors")
    check(not any(named for _, named in groups.values()), "F11", "facts of what has no tensors")
    labels = {c.label for c in components if isinstance(c, OfForm)}
    check(groups.keys() <= labels, "F32", "facts of a form that the file has not")
    used = {c.facts["factors"] for c in components if c.form == "shared"}
    check(shared.keys() == used, "F11", "shared factors that no component shares")
    return components


def read_bare(module, parameter, roles, default, scalings):
    """The components of one target whose roles stand alone (F7, F24 to F29, F34 to F37)."""
    name = full_name(module, parameter)

    def pair(first, second):
        found = roles.pop(first, None), roles.pop(second, None)
        check((found[0] is None) == (found[1] is None), "F11", f"`{name}`: {first} or {second}")
        return found

    for a, b in PAIRS:
        if {a, b} & roles.keys():
            called = short_name(module, parameter)
            component = Component(module, *pair(a, b), *scalings.pop(called, default), parameter)
            component.kind = a[:-2] if a in ("embedding_A", "merged_A") else ""
            plain = a == "lora_A.weight"
            if not plain and component.kind != "merged":
                for role in ("rank_gain", "magnitude", "in_magnitude"):
                    setattr(component, role, roles.pop(role, None))
            check_factors(component, name)
            check(component.is_plain() == plain, "F10", f"`{name}`: plain factors")
            if plain:
                check_alpha(component, roles.pop("alpha", None))
            yield component
    if "value" in roles:
        yield Replaced(module, parameter, roles.pop("value"))
    if "base" in roles:
        yield Base(module, parameter, roles.pop("base"))
    rows, indices = pair("rows", "indices")
    if rows is not None:
        check(rows.dtype in FLOATS, "F28", f"`{name}`: rows of {rows.dtype}")
        check(len(rows.shape) == 2 and rows.shape[0], "F28", f"`{name}`: rows {rows.shape}")
        check((indices.dtype, indices.shape) == ("I64", rows.shape[:1]), "F28",
              f"`{name}`: {indices.dtype} {indices.shape}")  # fmt: skip
        places = np.frombuffer(indices.data, "<i8").tolist()
        check(places == sorted(set(places)) and places[0] >= 0, "F28", f"`{name}`: {places}")
        yield Rows(module, parameter, places, rows)
    change, scale = pair("added", "scale")
    if change is not None:
        check(change.dtype in FLOATS, "F29", f"`{name}`: a change of {change.dtype}")
        check((scale.dtype, scale.shape) == ("F64", []), "F29", f"`{name}`: no F64 scalar")
        (value,) = struct.unpack("<d", scale.data)
        check(math.isfinite(value), "F29", f"`{name}`: {value}")
        yield Added(module, parameter, change, value)
    check(not roles, "F11", f"`{name}`: {sorted(roles)} belong to no component")


def check_factors(component, name):
    a, b = component.a, component.b
    for factor in (a, b):
        check(factor.dtype in FLOATS, "F7", f"`{name}`: dtype {factor.dtype}")
    rule = {"linear": "F7", "convolution": "F24", "embedding": "F25", "merged": "F35"}[component.layer]
    dimensions = len(a.shape) if component.layer == "convolution" else 2
    for factor in (a, b):
        check(len(factor.shape) == dimensions, rule, f"`{name}`: shape {factor.shape}")
    check(set(b.shape[2:]) <= {1}, rule, f"`{name}`: shape {b.shape}")
    if component.layer == "merged":
        groups, rest = divmod(a.shape[0], b.shape[1]) if b.shape[1] else (0, 1)
        check(groups and not rest and b.shape[0] % groups == 0, rule, f"`{name}`: the groups differ")
    else:
        check(a.shape[0] == b.shape[1], rule, f"`{name}`: the ranks differ")
    check(1 <= component.rank <= MAX_RANK, "F6", f"`{name}`: rank {component.rank}")
    check(math.isfinite(component.scale), "F12", f"`{name}`: scale {component.scale}")
    check(component.magnitude is None or component.in_magnitude is None, "F36", f"`{name}`: both magnitudes")
    lengths = {"rank_gain": ("F34", component.rank), "magnitude": ("F26", b.shape[0]), "in_magnitude": ("F36", a.shape[1])}
    for role, tensor in component.gains().items():
        rule, length = lengths[role]
        check(tensor.dtype in FLOATS, rule, f"`{name}`: {role} of {tensor.dtype}")
        check(tensor.shape == [length], rule, f"`{name}`: {role} of shape {tensor.shape}")


def fits(pattern, shape, lengths):
    """Whether a shape is as the table has it; what its letters stand for goes into `lengths`."""
    if pattern == "line":
        return 0 not in shape and sum(n != 1 for n in shape) <= 1
    shape = list(shape)
    for token in pattern.split():
        if token == "1*":
            while shape and shape[0] == 1:
                shape.pop(0)
        elif token in ("k+", "k*", "1k"):
            kernel, shape = shape, []
            known = lengths.setdefault("kernel", kernel)
            if token == "1k":
                if kernel != [1] * len(known):
                    return False
            elif kernel != known or len(kernel) > 3 or 0 in kernel or len(kernel) < (token == "k+"):
                return False
        else:
            if not shape:
                return False
            length = shape.pop(0)
            if token.isdigit():
                if length != int(token):
                    return False
            elif token == "tri":
                if math.isqrt(8 * length + 1) ** 2 != 8 * length + 1:
                    return False
            elif (length == 0 and not token.endswith("?")) or lengths.setdefault(token, length) != length:
                return False
    return not shape


def check_roles(form, name, roles):
    """F31: the tensors of a form and their shapes."""
    lengths, left = {}, set(roles)
    for slot in FORMS[form] + ([] if form == "experts" else [DECOMPOSED]):
        present = left & {role for alternative in slot for role in alternative}
        left -= present
        alternative = next((roles for roles in slot if set(roles) == present), None)
        check(alternative is not None, "F31", f"`{name}`: {sorted(present)} make no {form}")
        lengths.pop("kernel", None)
        for role, pattern in alternative.items():
            tensor = roles[role]
            known = ("I32", "I64") if role == "indices" else FLOATS
            check(tensor.dtype in known, "F31", f"`{name}`: {role} of {tensor.dtype}")
            check(fits(pattern, tensor.shape, lengths), "F31", f"`{name}`: {role} of {tensor.shape}")
    for rank in "rqps":
        check(lengths.get(rank, 1) <= MAX_RANK, "F6", f"`{name}`: rank {lengths.get(rank)}")
    return lengths


def read_form(module, parameter, label, roles, groups, shared):
    """A component of a form that has roles of its own (F31 to F33, F38 to F52)."""
    name, form = full_name(module, parameter), label.split(".")[0]
    facts = {}
    if form in FACTS:
        check(label in groups, "F32", f"`{name}`: no facts of {label}")
        default, named = groups[label]
        facts = named.pop(short_name(module, parameter), default)
    if form == "shared":
        check(facts["factors"] in shared, "F51", f"`{name}`: factors {facts['factors']}")
        roles = shared[facts["factors"]] | roles
    lengths = check_roles(form, name, roles)
    rank = facts.get("rank", lengths.get("r"))
    scalings = [(facts["scaling"], rank)] if "scaling" in facts else []
    if form == "experts":
        parameters = parameter.split("|")
        matched = all(parameters) and len(parameters) == len(facts["candidates"])
        check(matched, "F52", f"`{name}`: {len(facts['candidates'])} candidates")
        scalings = [(candidate["scaling"], candidate["rank"]) for candidate in facts["candidates"]]
        whole = all(rank and lengths["m"] % rank == 0 for _, rank in scalings)
        check(whole, "F52", f"`{name}`: A has {lengths['m']} rows")
    for (alpha, rule), rank in scalings:
        check(1 <= rank <= MAX_RANK, "F6", f"`{name}`: rank {rank}")
        scale = RULES[rule](alpha, rank)
        check(math.isfinite(scale), "F12", f"`{name}`: scale {scale}")
    radius = facts.get("radius", 0)
    check(math.isfinite(radius) and radius >= 0, "F42", f"`{name}`: radius {radius}")
    if form == "grid":
        check(lengths["r"] % lengths["k"] == 0, "F50", f"`{name}`: rank {lengths['r']}")
    if form == "shared":
        check(lengths["o"] <= lengths["y"], "F51", f"`{name}`: {lengths['o']} outputs")
    return OfForm(module, parameter, label, roles, facts)


def read_facts(form, value):
    """F33."""
    required, optional = FACTS[form]
    check(isinstance(value, dict), "F33", "facts are no object")
    facts = {name: fact for name, fact in value.items() if fact is not None}
    check(set(required) <= facts.keys() <= {*required, *optional}, "F33", f"{form}: the facts {sorted(facts)}")

    def scaling(value):
        check(isinstance(value, dict) and value.keys() == {"alpha", "rule"}, "F33", f"{form}: {value!r}")
        check(value["rule"] in RULES, "F33", f"{form}: the rule {value['rule']!r}")
        alpha = value["alpha"]
        check(isinstance(alpha, (int, float)) and not isinstance(alpha, bool), "F33", f"{form}: {alpha!r}")
        return float(alpha), value["rule"]

    for name, fact in facts.items():
        match name:
            case "axis":
                known = fact in ("in", "out")
            case "stored":
                known = fact in ("whole", "less-one")
            case "layer":
                known = fact in ("linear", "convolution", "embedding")
            case "orthogonal":
                known = isinstance(fact, bool)
            case "radius":
                known = isinstance(fact, (int, float)) and not isinstance(fact, bool)
            case "scaling":
                known, facts[name] = True, scaling(fact)
            case "candidates":
                known = isinstance(fact, list)
                for candidate in fact if known else []:
                    check(isinstance(candidate, dict) and candidate.keys() == {"scaling", "rank"}, "F33", f"{candidate}")
                    check(whole(candidate["rank"]), "F33", f"rank {candidate['rank']!r}")
                if known:
                    facts[name] = [{"scaling": scaling(c["scaling"]), "rank": c["rank"]} for c in fact]
            case _:
                known = whole(fact)
        check(known, "F33", f"{form}: {name} is {fact!r}")
    return facts


def read_groups(groups):
    """F32: (default facts, facts by name) of each form."""
    found = {}
    for group in groups or []:
        closed(group, ("form", "facts", "modules"), "a group of facts")
        label = member(group, "form", str, required=True, rule="F32")
        form = label.split(".")[0]
        check(re.fullmatch(LABEL, label) and form in FACTS, "F32", f"the form {label!r}")
        check(form != "experts" or int(label[8:]) < 1 << 64, "F32", f"the form {label!r}")
        facts = read_facts(form, group.get("facts"))
        default, named = found.setdefault(label, [None, {}])
        modules = member(group, "modules", list, rule="F32") if group.get("modules") is not None else None
        if modules is None:
            check(default is None, "F32", f"{label}: two groups without modules")
            found[label][0] = facts
        for module in modules or []:
            check(isinstance(module, str), "F32", f"a module is {module!r}")
            check(module not in named, "F32", f"{label}: `{module}` is in two groups")
            named[module] = facts
    for label, (default, _) in found.items():
        check(default is not None, "F32", f"{label}: no group without modules")
    return found


def check_alpha(component, alpha):
    name = f"`{component.module}.alpha`"
    check(alpha, "F9", f"{name} is missing")
    check((alpha.dtype, alpha.shape) == ("F32", []), "F9", f"{name} is no F32 scalar")
    expected = component.stored_alpha()
    check(np.isfinite(expected), "F9", f"{name}: s·rank is beyond f32")
    check(alpha.values() == expected, "F9", f"{name} is {alpha.values()}, not {expected}")


def check_together(components):
    """F30, and that no two targets have one short name (F13)."""
    targets = {}
    for component in components:
        targets.setdefault((component.module, component.parameter), []).append(component)
    own = {parameter for module, parameter in targets if not module}
    both = sorted(own & {module for module, parameter in targets if parameter == "weight"})
    check(not both, "F13", f"{both} are parameters and modules")
    for target, together in targets.items():
        name = full_name(*target)
        forms = [getattr(c, "label", c.form) for c in together]
        check(len(set(forms)) == len(forms), "F30", f"`{name}` is changed twice by one form")
        whole = [c for c in together if c.form in ("base", "replaced")]
        rows = [c for c in together if c.form == "rows"]
        changes = [c for c in together if c.form not in ("base", "replaced", "rows")]
        check(len(whole) < 2, "F30", f"`{name}` is replaced and copied")
        check(not rows or not changes, "F30", f"rows of `{name}`, and changes of all")
        dependent = [c for c in changes if c.form != "added" and c.depends()]
        check(len(dependent) < 2, "F30", f"`{name}`: the order of two changes matters")


def read(path):
    tensors, metadata, data = read_container(path)
    check("lora_format" in metadata, "F3", "no lora_format in __metadata__")
    check(metadata.pop("format", None) == "pt", "F3", "`format` is not `pt`")
    text = metadata.pop("lora_format")
    check(len(text.encode()) <= MAX_CONFIG, "F6", "a configuration over 32 MiB")
    config = parse(text, "F3", "the configuration")
    check(isinstance(config, dict), "F3", "the configuration is no object")
    config = {name: value for name, value in config.items() if value is not None}

    version = member(config, "version", str, required=True, rule="F20")
    check(re.fullmatch(r"1\.\d+(-[0-9A-Za-z.-]+)?", version), "F20", f"version {version}")
    requires = member(config, "requires", list, required=True, rule="F20")
    unknown = [name for name in requires if not isinstance(name, str) or name not in FEATURES]
    check(not unknown, "F20", f"requires {unknown}")
    digest = member(config, "digest", str, required=True, rule="F23")
    check(re.fullmatch("sha256:[0-9a-f]{64}", digest), "F23", f"digest {digest}")

    default = config.get("scaling")
    default = read_scaling(default) if default is not None else None
    scalings = {}
    for override in member(config, "overrides", list) or []:
        closed(override, ("scaling", "modules"), "an override")
        scaling = read_scaling(override.get("scaling"))
        for module in member(override, "modules", list, required=True, rule="F13"):
            check(isinstance(module, str), "F13", f"a module is {module!r}")
            check(module not in scalings, "F13", f"`{module}` is in two overrides")
            scalings[module] = scaling

    groups = read_groups(member(config, "forms", list, rule="F32"))
    names = config.get("names")
    check(names is None or (isinstance(names, str) and names in NAMINGS), "F53", f"names of {names!r}")

    base = member(config, "base", dict) or {}
    base = {k: base[k] for k in ("name", "revision", "fingerprint") if base.get(k) is not None}
    member(base, "name", str)
    member(base, "revision", str)
    if member(base, "fingerprint", dict) is not None and not read_fingerprint(base["fingerprint"]):
        del base["fingerprint"]
    source = member(config, "source", dict)
    if source is not None:
        closed(source, ("format", "config"), "source")
        known = member(source, "format", str, required=True) in CONFIGURED
        check(known, "F15", f"a configuration of {source['format']!r}")
        member(source, "config", dict, required=True)
    extensions = member(config, "extensions", dict) or {}
    for name, extension in extensions.items():
        check(re.fullmatch(r"[^.]+\..+", name), "F22", f"{name!r} is not vendor.name")
        closed(extension, ("copy", "value"), f"the extension {name}", "F22")
        check(extension.get("copy") in ("safe", "unsafe"), "F22", f"{name}: copy is neither")
        check("value" in extension, "F22", f"{name}: no value")

    components = in_order(read_components(tensors, default, scalings, groups))
    check(components, "F11", "no components")
    check_together(components)
    used = sorted(set().union(*(component.features() for component in components)))
    check(requires == used, "F20", f"requires {requires}, uses {used}")
    fan_in_fan_out = member(config, "fan_in_fan_out", bool)
    matches = digest == "sha256:" + hashlib.sha256(data).hexdigest()
    return Adapter(components, base, fan_in_fan_out, names, source, extensions, metadata, digest, matches)


# ---------------------------------------------------------------- writing


def scaling_value(alpha, rule):
    """F14: integral alphas below 2^53 as integers."""
    alpha = float(alpha)
    minus_zero = alpha == 0 and math.copysign(1, alpha) < 0
    integral = alpha.is_integer() and abs(alpha) < 1 << 53 and not minus_zero
    return {"alpha": int(alpha) if integral else alpha, "rule": rule}


def facts_value(form, facts):
    """F33: facts in the order of the table."""
    required, optional = FACTS[form]
    facts = {name: facts[name] for name in required + optional if name in facts}
    if "scaling" in facts:
        facts["scaling"] = scaling_value(*facts["scaling"])
    if "candidates" in facts:
        facts["candidates"] = [{"scaling": scaling_value(*candidate["scaling"]), "rank": candidate["rank"]}
                               for candidate in facts["candidates"]]  # fmt: skip
    if "radius" in facts:
        facts["radius"] = scaling_value(facts["radius"], "")["alpha"]
    return facts


def form_groups(label, groups):
    """F32: the most common facts first, for all; then the others, in order, with their names."""
    default = max(sorted(groups), key=lambda text: len(groups[text][1]))
    yield {"form": label, "facts": groups[default][0]}
    for text in sorted(groups):
        if text != default:
            facts, modules = groups[text]
            yield {"form": label, "facts": facts, "modules": sorted(modules)}


def encode(adapter):
    """The bytes of the file (F4, F5)."""
    tensors, shared = {}, []
    groups, forms = {}, {}
    for component in in_order(adapter.components):
        tensors |= component.tensors()
        if isinstance(component, OfForm):
            facts = dict(component.facts)
            if component.form == "shared":
                # F51: each pair once, numbered as the components first use it.
                pair = component.shared()
                if pair not in shared:
                    shared.append(pair)
                facts["factors"] = shared.index(pair)
            if facts:
                value = facts_value(component.form, facts)
                forms.setdefault(component.label, {}).setdefault(compact(value), (value, []))[1].append(component.called())
        if isinstance(component, Component):
            (bits,) = struct.unpack("<Q", struct.pack("<d", component.alpha))
            key = (component.rule, bits, float(component.alpha))
            groups.setdefault(key, []).append(component.called())
    for number, pair in enumerate(shared):
        tensors |= {f"lora:shared.{number}.{factor}": tensor for factor, tensor in zip("AB", pair)}
    stored = sorted(tensors.items(), key=lambda t: (-ORDER[t[1].dtype], t[0]))
    data = b"".join(tensor.data for _, tensor in stored)

    # F13: the most common scaling, and the first of equally common ones, is the default.
    ordered = sorted(groups, key=lambda key: list(RULES).index(key[0]) << 64 | key[1])
    default = max(ordered, key=lambda key: len(groups[key]), default=None)
    config = {
        "version": "1.0",
        "requires": sorted(set().union(*(c.features() for c in adapter.components))),
        "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
        "scaling": scaling_value(default[2], default[0]) if default else None,
        "overrides": [
            {"scaling": scaling_value(key[2], key[0]), "modules": sorted(groups[key])}
            for key in ordered
            if key != default
        ],
        "forms": [group for label in sorted(forms) for group in form_groups(label, forms[label])],
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "names": adapter.names,
        "base": {k: adapter.base[k] for k in ("name", "revision", "fingerprint") if k in adapter.base},
        "source": adapter.source,
        "extensions": adapter.extensions,
    }
    config = {k: v for k, v in config.items() if v is not None and v != [] and v != {}}
    metadata = adapter.metadata | {"format": "pt", "lora_format": compact(config)}
    header = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, tensor in stored:
        offsets = [at, at + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = compact(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write(path, adapter):
    Path(path).write_bytes(encode(adapter))


# ---------------------------------------------------------------- the base's identity


def positions(count):
    return [((i + 1) * GOLDEN % (1 << 64)) * count >> 64 for i in range(16)]


def samples(tensor):
    count = math.prod(tensor.shape)
    return tensor.values().reshape(-1)[positions(count) if count else []]


def fingerprint(components, base):
    """F17, from the base's tensors by name."""
    components = in_order(components)
    m = min(len(components), 64)
    targets = []
    for component in (components[i * len(components) // m] for i in range(m)):
        name = full_name(component.module, component.parameter)
        values = base64.b64encode(samples(base[name]).astype("<f4").tobytes()).decode()
        targets.append({"target": name, "dtype": base[name].dtype,
                        "shape": list(base[name].shape), "values": values})  # fmt: skip
    return {"algorithm": "samples-1", "targets": targets}


def rounded(values, dtype):
    """Values of f32 at the nearest of another dtype, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32)
    return values


def compare(stored, base):
    """F18: same, same-re-encoded, different or unknown."""
    if stored is None or stored["algorithm"] != "samples-1":
        return "unknown"
    seen, same_dtypes = False, True
    for target in stored["targets"]:
        tensor = base.get(target["target"])
        if tensor is None or tensor.dtype not in FLOATS:
            continue
        seen = True
        theirs = np.frombuffer(base64.b64decode(target["values"]), "<f4")
        if list(tensor.shape) != target["shape"]:
            return "different"
        ours = samples(tensor)
        agrees = (ours == theirs) | (rounded(ours, target["dtype"]) == theirs)
        agrees |= ours == rounded(theirs, tensor.dtype)
        if not agrees.all():
            return "different"
        same_dtypes &= tensor.dtype == target["dtype"]
    if not seen:
        return "unknown"
    return "same" if same_dtypes else "same-re-encoded"


# ---------------------------------------------------------------- command line


def describe(adapter):
    def factor(tensor):
        return {"dtype": tensor.dtype, "shape": tensor.shape,
                "sha256": hashlib.sha256(tensor.data).hexdigest()}  # fmt: skip

    def component(c):
        target = {} if c.parameter == "weight" else {"parameter": c.parameter}
        match c:
            case Component():
                form = {} if c.layer == "linear" else {"layer": c.layer}
                form |= {role: factor(tensor) for role, tensor in c.gains().items()}
                form |= {"rank": c.rank, "alpha": float(c.alpha), "rule": c.rule,
                         "scale": c.scale, "a": factor(c.a), "b": factor(c.b)}  # fmt: skip
            case Replaced():
                form = {"value": factor(c.value)}
            case Base():
                form = {"base": factor(c.value)}
            case OfForm():
                facts = facts_value(c.form, c.facts) if c.facts else {}
                form = {"form": c.label, "facts": facts, "tensors": {r: factor(c.roles[r]) for r in sorted(c.roles)}}
            case Rows():
                form = {"indices": c.indices, "rows": factor(c.rows)}
            case Added():
                form = {"added": factor(c.change), "scale": c.scale}
        return {"module": c.module} | target | form

    return {
        "modules": [component(c) for c in adapter.components],
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "names": adapter.names,
        "base": {k: adapter.base.get(k) for k in ("name", "revision", "fingerprint")},
        "source": adapter.source,
        "extensions": adapter.extensions,
        "metadata": dict(sorted(adapter.metadata.items())),
        "digest": adapter.digest,
        "digest_matches": adapter.digest_matches,
    }


def main(arguments):
    match arguments:
        case ["read", *paths] if paths:
            refused = False
            for path in paths:
                try:
                    found = describe(read(path))
                except Refused as error:
                    found, refused = {"refused": error.rule, "why": str(error)}, True
                text = json.dumps(found, indent=1, ensure_ascii=False)
                sys.stdout.buffer.write(text.encode() + b"\n")
            sys.exit(refused)
        case ["rewrite", *paths] if paths and len(paths) % 2 == 0:
            for source, destination in zip(paths[::2], paths[1::2]):
                write(destination, read(source))
        case ["make", out]:
            import make_native_fixtures

            make_native_fixtures.make(Path(out))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refused:
        sys.exit(str(refused))
