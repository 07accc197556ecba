"""A page taken apart by the standard library's parser, which knows nothing of how it was made."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a test wants to know of a page.

    Attributes:
        ids: of all elements, in order.
        references: what ``href`` and ``url(#...)`` point to.
        loads: attributes by which a browser fetches something.
        tables: rows of cells, as text.
        best: cells that are marked, as (table, row, column).
        titles, notes: of figures, and of what cannot be shown.
        unclosed: elements that were not closed, or closed in another order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.loads: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.best: list[tuple[int, int, int]] = []
        self.titles: list[str] = []
        self.notes: list[str] = []
        self.elements: set[str] = set()
        self.unclosed: list[str] = []
        self._open: list[str] = []
        self._in_note = False
        self.feed(text)
        self.close()
        self.unclosed += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attrs}
        self.elements.add(tag)
        if tag not in _VOID:
            self._open.append(tag)
        self._look_at(facts)
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                if facts.get("class") == "best":
                    rows = self.tables[-1]
                    self.best.append((len(self.tables) - 1, len(rows) - 1, len(rows[-1])))
                self.tables[-1][-1].append("")
            case "h3":
                self.titles.append("")
            case "p":
                self._in_note = facts.get("class") == "note"
                if self._in_note:
                    self.notes.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self._look_at({name: value or "" for name, value in attrs})

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
            self._in_note = self._in_note and tag != "p"
        else:
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif inside == "h3":
            self.titles[-1] += data
        elif self._in_note:
            self.notes[-1] += data

    def _look_at(self, facts: dict[str, str]) -> None:
        if "id" in facts:
            self.ids.append(facts["id"])
        for name in ("href", "xlink:href"):
            if name in facts:
                target = facts[name]
                if target.startswith("#"):
                    self.references.add(target[1:])
                elif not target.startswith("data:"):
                    self.loads.append(target)
        for name in ("src", "srcset", "action", "data", "poster"):
            if name in facts and not facts[name].startswith("data:"):
                self.loads.append(facts[name])
        for value in facts.values():
            for piece in value.split("url(")[1:]:
                target = piece.split(")")[0].strip("'\"")
                if target.startswith("#"):
                    self.references.add(target[1:])
                else:
                    self.loads.append(target)
