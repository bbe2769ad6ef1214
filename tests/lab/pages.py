"""A report's page, taken apart for tests."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that every element is closed in order and collects what the page asks of the outside world."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "data", "action", "xlink:href") and not value.startswith(
                ("#", "data:,")
            ):
                self.outside.append(value)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
