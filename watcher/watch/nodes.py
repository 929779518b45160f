# SPDX-License-Identifier: LGPL-2.1-or-later
"""What watching keeps in mind: interests, and the tree of real directories that their paths lead through.

Data only; `chase.py` says how it comes about. There are many of these (seven interests a service), and they are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from watcher.model import Interest, Scope


class Bound:
    """An interest, the keys that have it, and where its path led when it was last chased.

    Attributes:
        matches: tells whether a name matters.
        nodes: where the way ends, crosses a link or turns back at `..`; all else on it is an ancestor of one of these.
        state: watch descriptor of the directory it leads to, or the negative errno that stopped it; 0: not chased yet.
    """

    __slots__ = ("interest", "keys", "matches", "nodes", "state")

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.matches = (
            re.compile(interest.pattern, re.DOTALL).fullmatch if interest.pattern is not None else bool
        )
        self.keys: set[str] = set()
        self.nodes: tuple[Node, ...] = ()
        self.state = 0

    @property
    def deep(self) -> bool:
        return self.interest.scope is Scope.TREE


class Node:
    """A real path: its parent's plus one name, which is no link, or one that the way of somebody crosses.

    Attributes:
        users: who has this among its `nodes`.
        ends: those of the users whose directory this is.
        wd: watch descriptor; None: not a directory, or not watched.
        deep: in the tree of somebody (Scope.TREE).
        level: how many directories lie between this and the root.
        dead: what is here and below does not answer, and is left alone.
        counted: for one that is deep, the tree (its top) that it was listed for, and how many entries it had.
    """

    __slots__ = ("children", "counted", "dead", "deep", "ends", "level", "name", "parent", "users", "wd")

    def __init__(self, parent: Node | None, name: str) -> None:
        self.parent = parent
        self.name = name
        self.children: dict[str, Node] = {}
        self.users: set[Bound] = set()
        self.ends: tuple[Bound, ...] = ()
        self.wd: int | None = None
        self.deep = False
        self.dead = False
        self.level: int = 0 if parent is None else parent.level + 1
        self.counted: tuple[Node, int] | None = None

    @property
    def path(self) -> str:
        names = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            names.append(node.name)
            node = node.parent
        return "/" + "/".join(reversed(names))

    def child(self, name: str) -> Node:
        node = self.children.get(name)
        if node is None:
            node = self.children[name] = Node(self, name)
        return node

    def below(self) -> Iterator[Node]:
        """This node and all under it."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(node.children.values())

    def users_below(self) -> set[Bound]:
        return set().union(*(node.users for node in self.below()))

    def trees(self) -> Iterator[Bound]:
        """Those in whose tree this is."""
        node: Node | None = self
        while node is not None and node.deep:
            yield from (bound for bound in node.ends if bound.deep)
            node = node.parent

    def nearest_top(self) -> Node:
        """Where the tree begins in which this is; itself, if it is in none."""
        node = self
        while not node.top and node.deep and node.parent is not None and node.parent.deep:
            node = node.parent
        return node

    @property
    def top(self) -> bool:
        """A tree begins here."""
        return any(bound.deep for bound in self.ends)
