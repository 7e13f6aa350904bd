"""HTML pages taken apart."""

import json
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The tags with their attributes, the text by the innermost tag, and the data of a page."""

    def __init__(self, text):
        super().__init__()
        self.bytes = len(text.encode())
        self.tags, self.open, self.text = [], [], {}
        self.feed(text)
        self.data = json.loads("".join(self.text["script"]))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well formed

    def handle_data(self, text):
        if self.open and text.strip():
            self.text.setdefault(self.open[-1], []).append(text.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def check(self):
        """Nothing is loaded from outside, nothing runs, and the page is small."""
        links = [value for _, attributes in self.tags for key, value in attributes.items() if key in ("src", "href")]
        assert all(link.startswith("data:image/") for link in links)
        assert self.all("script") == [{"type": "application/json", "id": "data"}]
        assert not any("url(" in text or "@import" in text for text in self.text["style"])
        assert not any(key.startswith("on") for _, attributes in self.tags for key in attributes)
        assert self.bytes <= 3_000_000 and not self.open
        return self
