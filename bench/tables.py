"""A table with a title and notes, for the terminal and for a Markdown page."""

from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

WIDTH = 160  # where standard output is no terminal


@dataclass(slots=True)
class Table:
    """`columns`: headings; the first `texts` of them are words, the rest numbers. `ruled`: rows that begin a new section."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: int = 1
    ruled: set[int] = field(default_factory=set)

    def print(self) -> None:
        console = Console(highlight=False, soft_wrap=False)
        if not console.is_terminal:
            console.width = WIDTH
        drawn = RichTable(title=self.title, box=box.SIMPLE_HEAD, title_justify="left")
        for number, column in enumerate(self.columns):
            drawn.add_column(column, justify="left" if number < self.texts else "right")
        for number, row in enumerate(self.rows):
            if number in self.ruled and number:
                drawn.add_section()
            drawn.add_row(*row)
        console.print(drawn)
        for note in self.notes:
            console.print(note, markup=False)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", row_of(self.columns)]
        lines.append(row_of(["---" if number < self.texts else "---:" for number in range(len(self.columns))]))
        lines += [row_of(row) for row in self.rows]
        return "\n".join(lines + [""] + [f"{note}  " for note in self.notes]).rstrip() + "\n"


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None, digits: int | None = None) -> str:
    """Three digits that count; nothing is a dash."""
    if value is None:
        return "-"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
