"""Globs with one {id}."""

from __future__ import annotations

import re

from mmpipe.errors import InputError

_TOKEN = re.compile(r"\{id\}|\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


class Matcher:
    """A path relative to the input folder → the id in it, or None.

    `{id}` stands for one or more characters, "/" among them: "{id}/photo.jpg" takes "a/b/photo.jpg" as the id "a/b".
    `*` and `?` stay within one folder or file name, `**/` is any number of folders, `[ab]` one of these. Where there
    is more than one way to read a path, the id is the longest: "{id}_*.jpg" reads "a_b_c.jpg" as "a_b". Upper and
    lower case differ. Raises InputError for a pattern without exactly one {id}, or that leaves the folder.
    """

    def __init__(self, modality: str, glob: str) -> None:
        where = f"input.pattern.{modality}: '{glob}'"
        if glob.count("{id}") != 1:
            raise InputError(f"{where}: needs {{id}} exactly once, as in '{{id}}/photo*.jpg' or 'photos/{{id}}.jpg'")
        if glob.startswith("/") or ".." in glob.split("/"):
            raise InputError(f"{where}: is relative to the input folder and stays inside it")
        try:
            self._expression = re.compile("".join(map(_translate, _TOKEN.findall(glob.removeprefix("./")))), re.DOTALL)
        except re.error as error:
            raise InputError(f"{where}: {error.msg}") from error

    def match(self, path: str) -> str | None:
        found = self._expression.fullmatch(path)
        # An id that begins or ends with "/" would be half of another one.
        return found["id"] if found and not (found["id"][0] == "/" or found["id"][-1] == "/") else None


def _translate(token: str) -> str:
    """One token of a glob as a regular expression: wildcards take little, so that the id takes much."""
    if token == "{id}":
        return "(?P<id>.+)"
    if token == "**/":
        return "(?:[^/]+/)*?"
    if token == "**":
        return ".*?"
    if token == "*":
        return "[^/]*?"
    if token == "?":
        return "[^/]"
    if len(token) > 2 and token[0] == "[":
        negated, inside = token[1] == "!", token[2:-1] if token[1] == "!" else token[1:-1]
        inside = "".join(mark if mark == "-" else re.escape(mark) for mark in inside)
        return f"[{'^/' if negated else ''}{inside}]"
    return re.escape(token)
