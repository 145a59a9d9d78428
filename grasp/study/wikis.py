"""Encyclopaedic text, an article at a time."""

import bz2
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from xml.etree.ElementTree import iterparse

from grasp.data.files import examples

FINEWIKI = "HuggingFaceFW/finewiki"
FINEWIKI_ITEMS = 100
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def finewiki() -> Iterator[str]:
    """The first 100 articles, those of PEFT's `method_comparison`; streamed, as 198 GB lie there.

    Raises:
        ValueError: it can't be had.
    """
    import datasets

    try:
        found = datasets.load_dataset(FINEWIKI, split="train", streaming=True)
        for row in islice(found, FINEWIKI_ITEMS):
            yield row["text"]
    except Exception as error:  # of many kinds, by what a hub and its files are
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{FINEWIKI} can't be read from the hub ({why})") from error


def wikitext() -> Iterator[str]:
    """The articles of WikiText-2's test split, which has a line a row."""
    return articles(row["text"] for _, row in examples(WIKITEXT))


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined to articles, each of which begins with ` = Title = `."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r"\s*= [^=].*[^=] =\s*", line) and any(map(str.strip, article)):
            yield "".join(article).strip()
            article = []
        article.append(line)
    if any(map(str.strip, article)):
        yield "".join(article).strip()


def dump(path: Path) -> Iterator[str]:
    """The articles of a bz2 dump of Wikipedia as plain text; redirects are none.

    Raises:
        ValueError: wikitextparser is not installed.
    """
    if find_spec("wikitextparser") is None:
        raise ValueError(
            "a dump of Wikipedia needs wikitextparser, which is not installed: pip install "
            "wikitextparser"
        )
    import wikitextparser

    with bz2.open(path) as file:
        for _, page in iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            markup = page.findtext("{*}revision/{*}text") or ""
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                parsed = wikitextparser.parse(markup)
                for reference in reversed(parsed.get_tags("ref")):
                    del reference[:]
                yield re.sub(r"\n{3,}", "\n\n", parsed.plain_text()).strip()
            page.clear()
