"""Which column of a person's table is what: found by its usual names, or named by the person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a log may hold, and the usual names of each column, letters and digits only; earlier names go first.
INTERACTION_ROLES: dict[str, tuple[str, ...]] = {
    "user": (
        *("user", "userid", "uid", "customer", "customerid", "visitorid", "visitor", "client", "clientid", "member"),
        *("memberid", "reviewerid", "reviewer", "buyer", "buyerid", "account", "accountid", "username", "person"),
        *("personid", "reader", "readerid", "listener", "subscriber", "session", "sessionid"),
    ),
    "item": (
        *("item", "itemid", "iid", "product", "productid", "sku", "movie", "movieid", "book", "bookid", "isbn"),
        *("video", "videoid", "news", "newsid", "article", "articleid", "anime", "animeid", "track", "trackid", "song"),
        *("songid", "game", "gameid", "asin", "parentasin", "businessid", "contentid", "content", "show", "showid"),
        *("listing", "listingid", "recipe", "recipeid", "artist", "artistid", "stockcode", "joke", "jokeid", "film"),
        *("filmid", "course", "courseid", "restaurant", "restaurantid", "place", "placeid", "app", "appid"),
    ),
    "rating": ("rating", "ratings", "stars", "score", "bookrating", "overall", "userrating", "grade"),
    "watch_ratio": ("watchratio", "completion", "completionrate", "playratio", "listenedratio"),
    "amount": (
        *("amount", "hours", "hoursplayed", "playtime", "playtimeforever", "plays", "playcount", "listens"),
        *("quantity", "qty", "count", "weight", "strength", "value"),
    ),
    "clicked": ("clicked", "click", "isclick", "label", "purchased", "isbuy", "liked", "islike", "target"),
    "event": ("event", "eventtype", "eventname", "action", "behavior", "behaviour", "interaction", "interactiontype"),
    "timestamp": (
        *("timestamp", "time", "datetime", "date", "ts", "eventtime", "unixreviewtime", "createdat", "created"),
        *("orderdate", "purchasedate", "invoicedate", "reviewtime", "reviewdate", "when", "at", "dateadded"),
    ),
    "split": ("split", "fold", "subset", "partition", "set"),
    "impression": ("impression", "impressionid", "requestid", "slate", "slateid", "listid"),
    "impressions": ("impressions",),
    "history": ("history",),
}
ITEM_ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", *INTERACTION_ROLES["item"]),
    "title": (
        *("title", "name", "itemname", "itemtitle", "producttitle", "productname", "booktitle", "movietitle"),
        *("headline", "gamename", "animename", "appname", "caption", "originaltitle", "label"),
    ),
    "text": ("text", "description", "abstract", "overview", "summary", "plot", "synopsis", "content", "bullets"),
    "categories": (
        *("categories", "category", "genres", "genre", "topics", "topic", "subcategory", "department", "section"),
        *("producttype", "productgroup", "producttypename", "categoryname", "categoryid"),
        *("category1", "category2", "category3", "maincategory", "tags"),
    ),
}
_MANY = ("categories",)  # roles that several columns may have together


@dataclass(frozen=True)
class ColumnMapping:
    """Columns named by a person: role -> names, for the log and for the items."""

    interactions: Mapping[str, tuple[str, ...]]
    items: Mapping[str, tuple[str, ...]]


def parse_columns(columns: str | Path | Mapping[str, Any] | None) -> ColumnMapping:
    """Read which columns a person named.

    Args:
        columns: "user=customer,item=sku,categories=kind+brand"; the name of a YAML file; or what such a file holds: a
            mapping of roles to names, for both tables together or under the keys "interactions" and "items". A
            table without a line of names has columns 1, 2 and so on.

    Raises:
        ValueError: an unknown role, or a text or file that is none of these.
        FileNotFoundError: no such YAML file.

    Example:
        >>> from flexrec.data import parse_columns
        >>> parse_columns("user=customer,item=sku,categories=kind+brand").interactions
        {'user': ('customer',), 'item': ('sku',)}
    """
    if columns is None:
        columns = {}
    elif isinstance(columns, Path) or (isinstance(columns, str) and columns.endswith((".yaml", ".yml"))):
        columns = read_yaml(Path(columns), "columns")
    elif isinstance(columns, str):
        columns = _parse_text(columns)
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns must map roles to names of columns, got {columns!r}")
    together = {k: v for k, v in columns.items() if k not in ("interactions", "items")}
    tables: dict[str, dict[str, tuple[str, ...]]] = {"interactions": {}, "items": {}}
    for role, names in together.items():
        fits = [t for t, roles in (("interactions", INTERACTION_ROLES), ("items", ITEM_ROLES)) if role in roles]
        if not fits:
            raise ValueError(f"columns: {_unknown(role, (*INTERACTION_ROLES, *ITEM_ROLES))}")
        tables[fits[0]][role] = _names(role, names)
    for table, roles in (("interactions", INTERACTION_ROLES), ("items", ITEM_ROLES)):
        given = columns.get(table) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"columns: {table} must map roles to names of columns, got {given!r}")
        for role, names in given.items():
            if role not in roles:
                raise ValueError(f"columns: in {table}, {_unknown(role, tuple(roles))}")
            tables[table][role] = _names(role, names)
    return ColumnMapping(tables["interactions"], tables["items"])


def _unknown(role: object, roles: Sequence[str]) -> str:
    return f"unknown role {role!r}; expected one of {', '.join(dict.fromkeys(roles))}"


def _parse_text(text: str) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, names = part.partition("=")
        if not equals or not names.strip():
            raise ValueError(f"columns must look like user=customer,item=sku, or name a .yaml file; got {part!r}")
        mapping[role.strip()] = names.split("+")
    return mapping


def _names(role: str, names: Any) -> tuple[str, ...]:
    given = names if isinstance(names, (list, tuple)) else [names]
    if not given or not all(isinstance(name, (str, int)) and str(name).strip() for name in given):
        raise ValueError(f"columns: {role} must be the name of a column, got {names!r}")
    if len(given) > 1 and role not in _MANY:
        raise ValueError(f"columns: {role} must be one column, got {names!r}")
    return tuple(str(name).strip() for name in given)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file, which is to hold ``what``, holds; a broken one is a ValueError on one line."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{what}: there is no file {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())[:200]}") from error


def find_columns(
    path: Path, names: Sequence[str], roles: Mapping[str, tuple[str, ...]], named: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Role -> columns of a table whose columns are ``names``: as ``named`` by a person, else by their usual names.

    Raises:
        ValueError: a named column is not there.
    """
    simple = {"".join(filter(str.isalnum, name.casefold())): name for name in reversed(names)}
    found: dict[str, tuple[str, ...]] = {}
    for role, given in named.items():
        for name in given:
            if name not in names:
                raise ValueError(f"{path}: has no column {name!r} for {role}; its columns are {_listed(names)}")
        found[role] = given
    taken = {name for group in found.values() for name in group}
    for role, usual in roles.items():
        if role not in found:
            fits = [simple[name] for name in usual if name in simple and simple[name] not in taken]
            fits = fits if role in _MANY else fits[:1]
            if fits:
                found[role] = tuple(fits)
                taken.update(fits)
    return found


def require(path: Path, names: Sequence[str], found: Mapping[str, tuple[str, ...]], role: str) -> None:
    """Raise a ValueError that lists the table's columns where none is known as ``role``."""
    if role not in found:
        raise ValueError(
            f"{path}: none of its columns is known as {role}: {_listed(names)}; name it, as in --columns {role}=NAME "
            f"(in Python columns='{role}=NAME'), or, where the file has no line of names, by its number, {role}=1"
        )


def _listed(names: Sequence[str]) -> str:
    cut = [name if len(name) <= 40 else name[:40] + ".." for name in names[:30]]
    return ", ".join(map(repr, cut)) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
