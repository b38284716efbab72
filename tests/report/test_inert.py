"""Whatever an attack recovered, and whatever a recipe is called, is text in the report and nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import folders
import pytest

from lmleak import report

HARMLESS = set(
    re.findall(
        r"\w+",
        """
    html head meta title style body header main section footer svg defs pattern rect line g text path circle h1 h2 h3 p
    span ul li dl div dt dd figure figcaption table thead tbody tr th td small details summary pre input label mark del
    ins i
""",
    )
)
PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</title></style></pre></svg><iframe src=https://example.org></iframe>",
    '"\' onmouseover=alert(1) x="',
    "{{ 7*7 }} {% raw %} <svg/onload=alert(1)>",
    "]]><a href=javascript:alert(1)>x</a> &lt;b&gt; &#60;b&#62;",
)


class Page(HTMLParser):
    """Collects what a browser would act on, and what it would show."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", "", "".join(self.shown))


def assert_inert(page: Page) -> None:
    assert {tag for tag, _ in page.tags} <= HARMLESS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "src", "srcset", "xlink:href", "action", "formaction", "srcdoc", "data"), (
                tag,
                name,
            )
            assert not (name == "http-equiv" and (value or "").lower() == "refresh")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_is_shown_and_not_run(tmp_path: Path, payload: str) -> None:
    made = folders.recipe(
        {"select.layers": [[0], [1]], "select.target_modules": [[payload]]},
        name=payload,
        model={"kind": "bert", "weights": payload},
    )

    def level(axes, batch):
        return ("ok", 0.5, None) if axes["select.layers"] == [0] else ("failed", None, payload)

    folder = folders.write(tmp_path / "run", made, level, 3, [payload], spoil=lambda text, _, batch: f"x {text} y")
    html = report.write(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert_inert(page)
    # reference, recovered, reason, recipe name and weights are all there to be read
    assert page.text.count(re.sub(r"\s+", "", payload)) >= 5


def test_page_refuses_script_and_network(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run", folders.recipe({}), lambda axes, batch: ("ok", 1.0, None))
    html = report.write(folder).read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    metas = [attributes for tag, attributes in Page(html).tags if tag == "meta"]
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in metas
    assert "://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#dots", "#hatch"}


def test_control_and_bidi_characters_are_pictures(tmp_path: Path) -> None:
    texts = ["pay \u202eDSU 1\x00\x1b[31m \ud800 end", "مرحبا بالعالم 123", "東京でラーメン"]
    folder = folders.write(tmp_path / "run", folders.recipe({}), lambda axes, batch: ("ok", 1.0, None), 3, texts)
    html = report.write(folder).read_bytes().decode("utf-8")
    assert not set(html) & {"\u202e", "\x00", "\x1b"}
    assert "⟨202E⟩" in html


def test_csv_text_starts_no_formula(tmp_path: Path) -> None:
    made = folders.recipe({"model.weights": ["=cmd()", "@x", "fine"]})
    folder = folders.write(tmp_path / "run", made, lambda axes, batch: ("failed", None, "+1-1"), 1)
    report.write(folder)
    rows = (folder / "cells.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[3:5] for row in rows[1:]] == [["'+1-1", "'=cmd()"], ["'+1-1", "'@x"], ["'+1-1", "fine"]]
