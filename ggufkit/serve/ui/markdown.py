"""Markdown of models, which nobody should trust, to HTML that is safe to show.

HTML in the text is shown as text. Pictures become links: showing one would tell
its address, which a model may have made up out of the conversation, to whoever
it names.
"""

from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

_MOST_MARKDOWN = 100_000
"""Characters of an answer that are formatted; a longer one is shown as it is."""
_MOST_COLOURED = 10_000
"""Characters of a block of code that gets colours."""
_COLOURED = frozenset(
    (
        *("bash", "c", "c++", "cpp", "css", "diff", "go", "html", "ini", "java", "javascript"),
        *("js", "json", "jsx", "kotlin", "lua", "makefile", "php", "python", "py", "ruby", "rust"),
        *("sh", "shell", "sql", "swift", "toml", "ts", "tsx", "typescript", "xml", "yaml", "yml"),
    )
)
"""Languages that get colours; Pygments' other lexers may take very long for odd texts."""
_COLOURS = HtmlFormatter(nowrap=True, classprefix="c-")


def to_html(text: str, *, colours: bool = True) -> str:
    """Markdown as HTML.

    Args:
        text: the Markdown.
        colours: whether code gets colours.
    """
    if len(text) > _MOST_MARKDOWN:
        return f'<div class="as-is">{escape(text)}</div>'
    html: str = _MARKDOWN.render(text, {"colours": colours})
    return html


def colour_css() -> str:
    """The colours of code, light and dark."""
    light = HtmlFormatter(style="default", classprefix="c-").get_token_style_defs(".code")
    dark = HtmlFormatter(style="github-dark", classprefix="c-").get_token_style_defs(
        ".body--dark .code"
    )
    return "\n".join([*light, *dark])


class _Renderer(RendererHTML):
    """Links that open elsewhere, pictures as links, and code with a bar above."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """A picture's address as a link."""
        token = tokens[idx]
        source = escape(str(token.attrs.get("src", "")))
        told = escape(token.content) or "picture"
        return f'<a class="picture" href="{source}">{told}</a>'

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """A block of code with its language."""
        token = tokens[idx]
        language = token.info.split(maxsplit=1)[0] if token.info.strip() else ""
        return _code(token.content, language, bool(env.get("colours")))

    def code_block(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        """A block of code that is known by its indent."""
        return _code(tokens[idx].content, "", False)


def _code(text: str, language: str, colours: bool) -> str:
    inside = _coloured(text, language.lower()) if colours else escape(text)
    bar = f'<div class="bar"><span>{escape(language or "text")}</span>'
    button = '<button type="button" class="copy-code">Copy</button></div>'
    return f'<div class="code">{bar}{button}<pre><code>{inside}</code></pre></div>\n'


def _coloured(text: str, language: str) -> str:
    if language not in _COLOURED or len(text) > _MOST_COLOURED:
        return escape(text)
    try:
        html: str = highlight(text, get_lexer_by_name(language), _COLOURS)
    except ClassNotFound:
        return escape(text)
    return html


_MARKDOWN = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable(
    ["table", "strikethrough"]
)
