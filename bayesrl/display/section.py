"""What a domain adds to the report."""

from typing import Any, NamedTuple


class Section(NamedTuple):
    """A part that a domain adds to the report.

    Attributes:
        title: heading.
        caption: a sentence that says what a good result looks like.
        body: a Matplotlib figure, a table as rows of cells with the headings first, or plain text.

    Example:
        >>> import bayesrl
        >>> table = [["arm", "pulls"], ["left", "12"], ["right", "88"]]
        >>> section = bayesrl.Section("Pulls", "A fit that has learned pulls the better arm most often.", table)
        >>> section.body[2]
        ['right', '88']
    """

    title: str
    caption: str
    body: Any
