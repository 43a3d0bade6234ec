"""Plans: the structs of operators that an engine creates once per shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from codegen import cpp
from codegen.calls import CallSpec


@dataclass
class PlanMember:
    """An operator of a plan: how it is declared and created."""

    kind: str
    member: str
    what: str
    create: list[str]
    condition: str = ""


@dataclass
class PlanStruct:
    """A struct of operators that are created together, for one shape."""

    name: str
    params: str
    locals: list[str] = field(default_factory=list)
    ops: list[PlanMember] = field(default_factory=list)
    keys: dict[tuple, str] = field(default_factory=dict)
    specs: dict[str, CallSpec] = field(default_factory=dict)

    def member(self, spec: CallSpec, hint: str, create: list[str], condition: str = "") -> str:
        """The operator with these create arguments: one that is there already serves again."""
        key = (spec.name, tuple(create), condition)
        if key in self.keys:
            return self.keys[key]
        name, taken = cpp.identifier(hint), {op.member for op in self.ops} | {"build", "workspace_size"}
        unique, n = name, 1
        while unique in taken:
            n += 1
            unique = f"{name}_{n}"
        self.ops.append(PlanMember(spec.name, unique, hint, create, condition))
        self.keys[key] = unique
        self.specs[spec.name] = spec
        return unique
