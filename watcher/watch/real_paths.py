# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the watcher keeps in mind: routes, and the real paths that they go through.

Data only: `follow_links.py` fills it. A service has about seven routes, so these objects are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from watcher.model import Interest, Scope


class Route:
    """An interest, the keys that have it, and where its path led when it was last followed.

    Attributes:
        matches: tells whether a name matters.
        nodes: where the path ends, crosses a link, or turns back at `..`. All else on it is above one of these.
        state: watch descriptor of the directory that the path leads to, or the negative errno that stopped it;
            0: not followed yet.
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
    def is_tree(self) -> bool:
        return self.interest.scope is Scope.TREE


class Node:
    """A real path: its parent's and one more name. That name is a link only where a route crosses it.

    Attributes:
        routes: those that have this among their `nodes`.
        ends: those of `routes` that lead to this directory.
        wd: watch descriptor; None: not a directory, or not watched.
        in_tree: in the tree of some route (Scope.TREE).
        level: how many directories lie between this and the root.
        barred: the file system here does not answer, so that nothing here and below is looked up.
        counted: if `in_tree` and listed: the top of the tree that it was listed for, and how many entries it had.
    """

    __slots__ = (
        "barred",
        "children",
        "counted",
        "ends",
        "in_tree",
        "level",
        "name",
        "parent",
        "routes",
        "wd",
    )

    def __init__(self, parent: Node | None, name: str) -> None:
        self.parent = parent
        self.name = name
        self.children: dict[str, Node] = {}
        self.routes: set[Route] = set()
        self.ends: tuple[Route, ...] = ()
        self.wd: int | None = None
        self.in_tree = False
        self.barred = False
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
        """The node of a name in this directory; made if there is none yet."""
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

    def routes_below(self) -> set[Route]:
        return set().union(*(node.routes for node in self.below()))

    def trees(self) -> Iterator[Route]:
        """Routes in whose tree this is."""
        node: Node | None = self
        while node is not None and node.in_tree:
            yield from (route for route in node.ends if route.is_tree)
            node = node.parent

    @property
    def is_top(self) -> bool:
        """A tree begins here."""
        return any(route.is_tree for route in self.ends)

    def nearest_top(self) -> Node:
        """Where the tree begins in which this is; this node itself if it is in none."""
        node = self
        while not node.is_top and node.in_tree and node.parent is not None and node.parent.in_tree:
            node = node.parent
        return node
