"""The calculator as a page: a form of all that ``minilora memory`` can be asked, and its answer as HTML.

`options` reads the form from the command line's own parser; `answer` parses a filled one as words of that command line,
asks `memory`, and writes the answer with `render`, `charts` and `grids`. So the page has no sums of its own, and its
JavaScript (page.js) only carries a state there and HTML back. Python answers in one of two places:

- `server`: ``minilora page``, on this machine, with the Python that runs it;
- worker.js: in the browser, with Pyodide; ``make page`` writes that site (tools/page_site.py).

`document` puts the page together, with the answer to its first question in it. Nothing here imports torch.
"""


def page_command(parser, arguments: list[str]) -> None:
    """Serve the page on this machine, to this machine alone."""
    from .server import serve

    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--quiet", action="store_true", help="open no browser")
    options = parser.parse_args(arguments)
    serve(options.port, browse=not options.quiet)
