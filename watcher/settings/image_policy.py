# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which protection an image needs: the language of systemd.image-policy(7), and what a policy says of an image. Pure.

A policy has a rule for each kind of partition, and one for all others: `root=signed:=absent`. A rule is a set of words.
Of each group of words (use, read-only, growfs, file systems) one has to be true of the partition; a group of which a
rule has no word does not matter. A confext has its `/etc` in the root partition, and so does a bare file system.

Three words of ours stand for whole policies: `any`, `verity` and `signed`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from watcher.model import Protection, Setting, Trust, shown

KEY: Final = "ImagePolicy"
UNIT_KEY: Final = "ExtensionImagePolicy"

ROOT: Final = "root"
_DATA: Final = ("root", "usr", "home", "srv", "esp", "xbootldr", "swap", "tmp", "var")
_HASH: Final = "-verity"
_SIGNATURE: Final = "-verity-sig"
_VERIFIED: Final = ("root", "usr")
"""The only partitions that may have a hash tree."""
DESIGNATORS: Final = frozenset(
    {*_DATA, *(f"{data}{part}" for data in _VERIFIED for part in (_HASH, _SIGNATURE))}
)

IGNORE: Final = frozenset({"unused", "absent"})
USE: Final = IGNORE | {"verity", "signed", "encrypted", "encryptedwithintegrity", "unprotected"}
_READ_ONLY: Final = frozenset({"read-only-on", "read-only-off"})
_GROWFS: Final = frozenset({"growfs-on", "growfs-off"})
FILE_SYSTEMS: Final = frozenset({"btrfs", "erofs", "ext4", "f2fs", "squashfs", "vfat", "xfs"})
"""Where a rule names none, systemd mounts all of these, and nothing else."""
_WORDS: Final = {
    **{word: frozenset({word}) for word in USE | _READ_ONLY | _GROWFS | FILE_SYSTEMS},
    "open": USE,
    "ignore": IGNORE,
}
_SINCE_258: Final = FILE_SYSTEMS | {"encryptedwithintegrity"}

OURS: Final = {"any": "*", "verity": "root=verity+signed", "signed": "root=signed"}
_FLAGS: Final = {1 << 60: "read-only", 1 << 59: "growfs"}
"""Of partitions (Discoverable Partitions Specification)."""
_WHOLE: Final = {"": IGNORE, "-": IGNORE, "*": USE, "~": frozenset({"absent"})}
_WHITE: Final = " \t\n\r"
_MANUAL: Final = "systemd.image-policy(7)"

# A signed image has a hash tree, too; and who does not ask for one may have an image that has it.
_SUFFICES: Final = {
    Protection.UNPROTECTED: ("unprotected",),
    Protection.VERITY: ("verity", "unprotected"),
    Protection.SIGNED: ("signed", "verity", "unprotected"),
}

Words = frozenset[str]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy.

    Attributes:
        rules: designator and words, as written.
        default: the words for all other partitions.
    """

    rules: tuple[tuple[str, Words], ...]
    default: Words

    def effective(self, designator: str) -> Words:
        """What holds for a kind of partition: of each group the words that are allowed, all where it does not matter.

        A rule for data holds for its hash tree and signature as far as these are needed for it.
        """
        words = dict(self.rules).get(designator)
        if words is None:
            words = self._of_data(designator)
        return _normal(designator, self.default if words is None else words)

    def _of_data(self, designator: str) -> Words | None:
        """The words for a hash tree or a signature by the rule for what it protects; None: there is no such rule."""
        for part, needed in ((_SIGNATURE, {"signed"}), (_HASH, {"signed", "verity"})):
            data = designator.removesuffix(part)
            if data != designator:
                words = dict(self.rules).get(data)
                of_data = None if words is None else _normal(data, words)
                if of_data is None or not of_data & needed:
                    return None
                return (of_data & (IGNORE | _READ_ONLY | _GROWFS)) | {"unprotected"}
        return None

    def allows(self, trust: Trust, file_system: str = "") -> bool:
        """Whether an image may be used.

        Args:
            file_system: by the kernel's name; "" for a tree, of which the kernel mounts none.
        """
        return self.lacks(trust, file_system) is None

    def lacks(self, trust: Trust, file_system: str = "") -> Words | None:
        """Words of which one would have to be true of an image, and none is; none at all if no image may be used.

        Returns:
            None: it may be used.
        """
        words = self.effective(ROOT)
        asked = words & USE - IGNORE
        if not asked.intersection(_SUFFICES[trust.protection]):
            return asked
        systems = words & FILE_SYSTEMS or FILE_SYSTEMS
        return systems if file_system and file_system not in systems else None

    def mismatch(self, parts: Sequence[tuple[str, int]]) -> str:
        """Why systemd would not start a unit on an image, whatever is proved of it; "" if it would.

        Where versions differ, what the stricter does: 257 takes what has a signature for `signed` and nothing else.
        Source: dissect_image(); `systemd-dissect --image-policy=` says the same.

        Args:
            parts: partitions and their flags; none of a bare file system.
        """
        used: dict[str, int] = {}
        for designator, flags in parts or ((ROOT, 0),):
            use = self.effective(designator) & USE
            if use == {"absent"}:
                return f"wants no partition {designator}"
            if use - {"absent"} != {"unused"}:
                used[designator] = flags
        for designator in sorted(DESIGNATORS - dict(parts).keys()) if parts else ():
            if "absent" not in self.effective(designator):
                return f"wants a partition {designator}"
        allowed = self.effective(ROOT)
        found = {"unprotected", "encrypted", "encryptedwithintegrity"}
        if ROOT + _HASH in used:
            found = {"signed"} if ROOT + _SIGNATURE in used else {"verity"}
        # What lies beside a bare file system is linked beside the slot as far as the policy needs it.
        if ROOT + _HASH in dict(parts) and not found & allowed:
            return f"does not allow a partition that is {_either(found)}, as systemd takes it"
        for designator, flags in used.items():
            for bit, name in _FLAGS.items():
                word = f"{name}-{'on' if flags & bit else 'off'}"
                if word not in self.effective(designator):
                    return f"does not allow a partition {designator} with {word}"
        return ""


def parse(text: str) -> Policy:
    """`ImagePolicy=`: one of our own words, or a policy as systemd 262 reads it.

    Raises:
        ValueError: it is none.
    """
    return systemds(OURS.get(text, text))


def in_unit(text: str) -> Policy:
    """`ExtensionImagePolicy=`: systemd 262 passes over words that it does not know. 257 fails to load such a unit file,
    and passes over the whole line in a drop-in.

    A rule of which nothing is left would then allow everything. We refuse that.

    Raises:
        ValueError: it is none.
    """
    return systemds(text, lenient=True)


@functools.lru_cache(maxsize=256)
def systemds(text: str, *, old: bool = False, lenient: bool = False) -> Policy:
    """A policy as systemd reads it.

    Args:
        old: as systemd 257, which does not know some words.
        lenient: pass over words that are not known.

    Raises:
        ValueError: it is none.
    """
    if text in _WHOLE:
        return Policy((), _WHOLE[text])
    rules: dict[str, Words] = {}
    for rule in _split(text, ":"):
        designator, *rest = (*_split(rule, "=", 1),)
        if not rest:
            raise ValueError(f"no policy: {shown(rule)} has no = ({_MANUAL})")
        designator = designator.strip(_WHITE)
        if designator and designator not in DESIGNATORS:
            if lenient:
                continue
            raise ValueError(f"no policy: there is no partition {shown(designator)}")
        if designator in rules:
            raise ValueError(f"no policy: two rules for {shown(designator) or 'all others'}")
        rules[designator] = _words(rest[0].strip(_WHITE), old=old, lenient=lenient)
    default = rules.pop("", IGNORE)
    return Policy(tuple(sorted(rules.items())), default)


def _words(text: str, *, old: bool, lenient: bool) -> Words:
    if text in ("", "-"):
        return frozenset()
    found: set[str] = set()
    for raw in _split(text, "+"):
        word = raw.strip(_WHITE)
        if word not in _WORDS or (old and word in _SINCE_258):
            if lenient:
                continue
            raise ValueError(f"no policy: {shown(word)} is no word of it ({_MANUAL})")
        found |= _WORDS[word]
    if not found:
        raise ValueError(f"no policy: {shown(text)} has no word that is known, and would allow everything")
    return frozenset(found)


def _split(text: str, separator: str, times: int = -1) -> Iterator[str]:
    r"""The parts of a text. A backslash takes what follows as it is (extract_first_word()); after `times` separators
    the rest comes as it is written."""
    part: list[str] = []
    rest = iter(enumerate(text))
    for place, char in rest:
        if char == separator:
            yield "".join(part)
            part.clear()
            times -= 1
            if not times:
                yield text[place + 1 :]
                return
        elif char != "\\":
            part.append(char)
        elif (escaped := next(rest, None)) is not None:
            part.append(escaped[1])
        else:
            raise ValueError(f"no policy: {shown(text)} ends with a backslash")
    yield "".join(part)


def _normal(designator: str, words: Words) -> Words:
    for group in (USE, _READ_ONLY, _GROWFS):
        if not words & group:
            words |= group
    if designator.endswith((_HASH, _SIGNATURE)):
        words -= {"verity", "signed", "encrypted", "encryptedwithintegrity"}
    if designator not in _VERIFIED:
        words -= {"verity", "signed"}
    if words & USE == {"absent"}:
        words -= _READ_ONLY | _GROWFS
    return words


def _either(words: Iterable[str]) -> str:
    """ "verity or signed"."""
    *others, last = sorted(words)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, slots=True)
class Demand:
    """A policy that counts for a service. An image has to pass all of them: so the stricter wins.

    Attributes:
        setting: `ImagePolicy=` or `ExtensionImagePolicy=`, and where it is written.
        policy: None: it is none.
        problem: why it is none.
    """

    setting: Setting
    policy: Policy | None
    problem: str = ""

    def refusal(self, trust: Trust, file_system: str = "", *, tree: bool = False) -> str:
        """Why an image or tree does not get in, and what to do; one line, "" if it does.

        Args:
            file_system: see `Policy.allows()`; "" also where it is not known.
        """
        setting = self.setting
        if self.policy is None:
            return f"nothing new gets in, {setting.key}= ({shown(setting.source)}) is {self.problem}: mend that line"
        asked = self.policy.lacks(trust, file_system)
        if asked is None:
            return ""
        who = f"{setting.key}={shown(setting.value)} ({shown(setting.source)})"
        if not asked:
            return f"{who} lets no image in at all: change that"
        if asked <= FILE_SYSTEMS:
            return (
                f"it is {file_system}, and {who} asks for {_either(asked)}: build it so, or change the policy"
            )
        what = "a directory tree is" if tree else "it is"
        why = f" ({trust.remark})" if trust.remark else ""
        words = f"{what} {trust.protection.value}{why}, and {who} asks for {_either(asked)}"
        return f"{words}: {_help(asked)}, or change the policy"


def unit_refusal(one: Demand, parts: Sequence[tuple[str, int]]) -> str:
    """Why systemd would not start a unit on an image by the unit's policy, one line; "" if it would."""
    setting = one.setting
    why = one.policy.mismatch(parts) if setting.key == UNIT_KEY and one.policy is not None else ""
    if not why:
        return ""
    who = f"{setting.key}={shown(setting.value)} ({shown(setting.source)})"
    return f"systemd would not start the unit on it, {who} {why}: build it otherwise, or change the policy"


def demand(setting: Setting) -> Demand:
    """What a setting asks for: `ImagePolicy=`, or else that of a unit."""
    try:
        policy = parse(setting.value) if setting.key == KEY else in_unit(setting.value)
    except ValueError as error:
        return Demand(setting, None, str(error))
    return Demand(setting, policy)


def _help(asked: Words) -> str:
    if "signed" in asked and not asked & {"verity", "unprotected"}:
        return (
            "sign it with a key whose certificate is in /etc/verity.d (systemd-repart --make-ddi=confext"
            " --private-key= --certificate=)"
        )
    if asked & {"verity", "signed"}:
        return "build it with a hash tree (systemd-repart --make-ddi=confext)"
    return "confexts are none of these"
