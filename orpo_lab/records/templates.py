"""The templates of pages: one way to fill them."""

import jinja2


def environment(package: str = "orpo_lab", folder: str = "templates") -> jinja2.Environment:
    """Return the environment that renders templates of a folder inside a package.

    A value that a template asks for must be given. In HTML every value is escaped.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, folder),
        autoescape=jinja2.select_autoescape(("html.jinja",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
