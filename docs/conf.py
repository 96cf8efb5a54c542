"""Sphinx configuration: ``make docs`` builds ``site``. Why these tools: decisions/documentation-site.md."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
os.environ["ROME_STATE_HOME"] = str(HERE / "generated" / "state")  # keeps the notebooks' runs apart from the user's

import generate  # noqa: E402
from sphinx.ext.napoleon import GoogleDocstring  # noqa: E402

from rome.core.version import __version__  # noqa: E402

project, author, copyright = "rome", "The rome developers", "2026, the rome developers"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["notebooks"]
suppress_warnings = ["config.cache"]  # the order of the notebooks is a function

smartquotes = False  # they would turn the two hyphens of --out into one dash

html_theme = "furo"
html_title = f"rome {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["attrs_block", "deflist"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = [("Sources", "notes_style")]

sphinx_gallery_conf = {
    "examples_dirs": "notebooks",
    "gallery_dirs": "generated/notebooks",
    "filename_pattern": ".",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "copyfile_regex": r".*\.txt",
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "within_subsection_order": "FileNameSortKey",
    "min_reported_time": 10_000,
    "plot_gallery": os.environ.get("NOTEBOOKS", "run") == "run",
}


# Napoleon takes the text before a colon in an attribute's docstring for its type; ours are sentences.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))


def setup(app: object) -> None:
    generate.write(HERE / "generated")
    app.connect("autodoc-process-signature", generate.signature)  # type: ignore[attr-defined]
    app.connect("source-read", generate.outside)  # type: ignore[attr-defined]
