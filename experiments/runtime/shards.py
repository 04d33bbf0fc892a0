"""One part of a command's work: several processes, on one machine or many, share a list of cases by --shard=i/n.

Each writes its own answers below one folder. The same command without --shard then finds them there, makes what is missing, and
writes tables of all.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import TypeVar

from absl import flags

from radgs_jax import errors

GRAMMAR = "i/n, the part's number from 0 and the number of parts"

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of some work: number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is all of the work."""
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, items: Iterable[_Item]) -> list[_Item]:
        """Its share of what must not be divided further, in turn, without repetitions; the order matters, so it must be the same
        for all parts."""
        return list(dict.fromkeys(items))[self.index :: self.count]


# `--help` of a command lists this flag as its own.
flags.disclaim_key_flags()

ALL = Shard()
"""All of the work."""


def define() -> None:
    """Defines --shard."""
    flags.DEFINE_string("shard", None, f"Do a part of the work: {GRAMMAR}; then the same command without it.")


def given() -> Shard:
    """The part that --shard names; raises InputError for another text."""
    text = flags.FLAGS.shard
    if text is None:
        return ALL
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        errors.fail("flags", "--shard", repr(text), GRAMMAR)
    return Shard(int(found[1]), int(found[2]))
