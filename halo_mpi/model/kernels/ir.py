"""Writing LLVM IR: lines of text, with a name for every value."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Code:
    """The lines of a function so far. A value's name gets a number, as IR gives every name once."""

    lines: list[str] = field(default_factory=list)

    def do(self, line: str) -> None:
        self.lines.append(f"  {line}")

    def let(self, name: str, value: str) -> str:
        name = f"%{name}.{len(self.lines)}"
        self.lines.append(f"  {name} = {value}")
        return name

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")

    def at(self, pointer: str, offset: int | str) -> str:
        """The address `offset` bytes behind a pointer."""
        return self.let("at", f"getelementptr i8, ptr {pointer}, i64 {offset}") if offset else pointer

    def load(self, name: str, kind: str, pointer: str, offset: int | str = 0, align: int = 1) -> str:
        return self.let(name, f"load {kind}, ptr {self.at(pointer, offset)}, align {align}")

    def splat(self, name: str, lanes: int, kind: str, scalar: str) -> str:
        """A vector whose every lane holds the scalar."""
        first = self.let("first", f"insertelement <{lanes} x {kind}> poison, {kind} {scalar}, i64 0")
        return self.let(
            name, f"shufflevector <{lanes} x {kind}> {first}, <{lanes} x {kind}> poison, <{lanes} x i32> zeroinitializer"
        )

    def lanes_of(self, name: str, kind: str, vector: str, indices: list[int]) -> str:
        """Some lanes of a vector: f"<{n} x {element}>"."""
        mask = ", ".join(f"i32 {index}" for index in indices)
        return self.let(name, f"shufflevector {kind} {vector}, {kind} poison, <{len(indices)} x i32> <{mask}>")


def constant(lanes: int, kind: str, value: int | float) -> str:
    return "<" + ", ".join([f"{kind} {value}"] * lanes) + ">"
