"""Text of models and data as HTML that does nothing: it runs no script and fetches nothing."""

import nh3
from markdown_it import MarkdownIt

# HTML in a text is shown as text; an image becomes a link, so that nothing is fetched. A line that
# defines a link, such as [1]: http://..., would show nowhere if it were taken as a definition
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable(["image", "reference"])
)
_TAGS = {"a", "blockquote", "br", "code", "em", "hr", "li", "ol", "p", "pre", "s", "strong", "ul"}
_TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6"}
_TAGS |= {"table", "tbody", "td", "th", "thead", "tr"}
_ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}


def to_html(text: str) -> str:
    """Return Markdown as HTML of harmless tags; links open in a new tab, and say not from where."""
    return nh3.clean(
        _MARKDOWN.render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
