"""Regular expressions that strangers may write: matched in linear time, so that no pattern can hang a command.

Python's `re` tries one way after another, and ``(([a-z0-9_]+)\\.?)+Z`` has exponentially many ways through a module's
name. Here all ways are followed at once (Thompson 1968): a pattern becomes an automaton, and reading a name keeps the
set of the states that its characters may have led to. Each set and character is worked out once and remembered.

A name is read from its end to its start. A lookahead then asks about characters that have been read already: it costs
one more reading of the name, and no search.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .tables import quoted

if TYPE_CHECKING:  # a type checker knows the two by their names before Python 3.11
    import sre_constants as op
    import sre_parse as _parser
else:
    from re import _constants as op
    from re import _parser

Value = TypeVar("Value")

MOST_CHARACTERS = 2_000_000  # of all patterns of a table: 20,000 modules named in full are about 1,200,000
MOST_COPIES = 20_000  # states more than characters, after x{3,5} has become x x x x? x?
MOST_LOOKAHEADS = 16
MOST_STEPS = 5_000_000  # that a table may work out (not look up) in its life; 20,000 names of their own take 2,100,000

CATEGORIES: dict[Hashable, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal, op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace, op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: is_word(c), op.CATEGORY_NOT_WORD: lambda c: not is_word(c),
}
# what may be said of a place p in a name, apart from lookaheads
PLACES: dict[Hashable, Callable[[str, int], bool]] = {
    op.AT_BEGINNING: lambda name, p: p == 0,
    op.AT_BEGINNING_STRING: lambda name, p: p == 0,
    op.AT_END: lambda name, p: name[p:] in ("", "\n"),
    op.AT_END_STRING: lambda name, p: p == len(name),
    op.AT_BOUNDARY: lambda name, p: is_word(name[p - 1:p]) != is_word(name[p:p + 1]),
}
WORDS = {op.GROUPREF: "a reference to a group", op.GROUPREF_EXISTS: "a condition on a group",
         op.POSSESSIVE_REPEAT: "a possessive repeat", op.ATOMIC_GROUP: "an atomic group", op.AT: r"\B"}


class PatternTable(Generic[Value]):
    r"""A value for each pattern; a name gets that of the first pattern that matches it whole, as `re.fullmatch` does.

    Known are literals, ``.``, classes, ``\d \s \w``, groups, ``|``, ``* + ? {m,n}`` (lazy ones too), ``^ $ \A \Z \b``
    and lookaheads. Unknown are flags, lookbehinds, references to groups, possessive repeats and atomic groups.

    Args:
        values: by pattern. written: makes the whole regular expression of a pattern.

    Raises:
        ValueError: no regular expression, one that needs what is unknown here, or patterns too long in all; and from
            `get` and `unused`, patterns that take too many steps on the names that they are asked about.
    """

    def __init__(self, values: Mapping[str, Value], written: Callable[[str], str] = str):
        self.values, self.written = list(values.items()), written
        if wrong := [pattern for pattern in values if not isinstance(pattern, str)]:
            raise ValueError(f"a pattern must be a string, got {quoted(wrong[0])}")
        if (characters := sum(len(written(pattern)) for pattern in values)) > MOST_CHARACTERS:
            raise ValueError(f"the patterns have {characters:,} characters in all, expected at most "
                             f"{MOST_CHARACTERS:,}")
        self.automaton = Automaton(characters + MOST_COPIES)
        for i, (pattern, _) in enumerate(self.values):
            try:
                parsed = _parser.parse(written(pattern))
                if flags := parsed.state.flags & ~re.UNICODE:
                    raise Unknown(f"the flag {re.RegexFlag(flags)!r}")
                self.automaton.add_pattern(i, parsed.data)
            except (re.error, OverflowError, RecursionError) as e:
                raise ValueError(f"{quoted(pattern)} is not a regular expression: {e}") from None
            except Unknown as e:
                raise ValueError(f"the pattern {quoted(pattern)} has {e}, which is not supported: it may cost more "
                                 "time than the length of a name") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the first pattern that matches the whole name."""
        numbers = self.automaton.accepted(name) if self.values else ()
        return self.values[numbers[0]][1] if numbers else default

    def unused(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of the names."""
        left = {i: pattern for i, (pattern, _) in enumerate(self.values)}
        for name in names:
            if not left:  # as of an empty table from the start: twenty thousand names need not be read for it
                break
            for i in self.automaton.accepted(name):
                left.pop(i, None)
        return list(left.values())

    def __reduce__(self):
        return PatternTable, (dict(self.values), self.written)


class Unknown(Exception):
    """Something in a pattern that has no place in an automaton of this kind."""


class StateSet:
    """Where an automaton may be after some characters: states that wait for a character, and patterns that match."""

    def __init__(self, waiting: tuple[int, ...], accepted: tuple[int, ...]):
        self.waiting, self.accepted = waiting, accepted
        self.next: dict[tuple[str, int], StateSet] = {}  # by the next character and the facts behind it


class Automaton:
    """States, each one of: (test of a character, next state); (None, next states); (number of a fact that must hold at
    this place, next state) or (-1, pattern), where a pattern has been read to its start.

    Args:
        most_states: it may have.
        anywhere: whether a match may end at every place of a name, as a lookahead's may, or only at its end.
    """

    def __init__(self, most_states: int, anywhere: bool = False):
        self.states: list[tuple] = []
        self.starts: list[int] = []
        self.facts: list[Callable[[str], Iterable[bool]]] = []  # what is asked about each place of a name
        self.places: dict[Hashable, int] = {}  # of PLACES -> its number in facts
        self.most_states, self.anywhere, self.lookaheads, self.steps = most_states, anywhere, 0, 0
        self.sets: dict[tuple, StateSet] = {}
        self.first: dict[int, StateSet] = {}  # before any character, by the facts at a name's end

    # From a pattern to states

    def add_pattern(self, number: int, parsed: Iterable[tuple]) -> None:
        self.starts.append(self.sequence(parsed, self.state(-1, number)))

    def state(self, *state) -> int:
        if len(self.states) >= self.most_states:
            raise Unknown(f"repeats that come to more than {MOST_COPIES:,} copies")
        self.states.append(state)
        return len(self.states) - 1

    def sequence(self, parsed: Iterable[tuple], then: int) -> int:
        """The state from which `parsed`, read backwards, leads to the state `then`."""
        for what, value in parsed:
            then = self.item(what, value, then)
        return then

    def item(self, what, value, then: int) -> int:
        if what in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return self.state(test_of(what, value), then)
        if what is op.BRANCH:
            return self.state(None, [self.sequence(branch, then) for branch in value[1]])
        if what is op.FAILURE:  # (?!)
            return self.state(None, [])
        if what is op.SUBPATTERN and not any(value[1:3]):
            return self.sequence(value[3], then)
        if what in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self.repeat(*value, then=then)
        if what is op.AT and value in PLACES:
            return self.state(self.place(value), then)
        if what in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:
            return self.state(self.lookahead(value[1], what is op.ASSERT), then)
        behind = what in (op.ASSERT, op.ASSERT_NOT)
        raise Unknown("a lookbehind" if behind else "a flag" if what is op.SUBPATTERN else WORDS.get(what, str(what)))

    def repeat(self, least: int, most: int, parsed: Iterable[tuple], then: int) -> int:
        if most is op.MAXREPEAT:
            loop = self.state(None, [then])
            self.states[loop][1].append(self.sequence(parsed, loop))
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self.state(None, [end, self.sequence(parsed, then)])
        for _ in range(least):
            before, then = then, self.sequence(parsed, then)
            if then == before:  # nothing, any number of times
                break
        return then

    def place(self, what) -> int:
        if what not in self.places:
            self.places[what] = len(self.facts)
            self.facts.append(lambda name: (PLACES[what](name, p) for p in range(len(name) + 1)))
        return self.places[what]

    def lookahead(self, parsed: Iterable[tuple], wanted: bool) -> int:
        self.lookaheads += 1
        if self.anywhere or self.lookaheads > MOST_LOOKAHEADS:
            raise Unknown("a lookahead in a lookahead" if self.anywhere else f"more than {MOST_LOOKAHEADS} lookaheads")
        inner = Automaton(self.most_states, anywhere=True)
        inner.add_pattern(0, parsed)
        self.facts.append(lambda name: (bool(s.accepted) == wanted for s in reversed(list(inner.read(name)))))
        return len(self.facts) - 1

    # Reading a name

    def accepted(self, name: str) -> tuple[int, ...]:
        """The numbers of the patterns that match the whole name, smallest first."""
        *_, last = self.read(name)
        return last.accepted

    def read(self, name: str) -> Iterable[StateSet]:
        """Where the automaton is at each place of the name, from the end to the start."""
        facts = [0] * (len(name) + 1)  # at each place, a bit for every fact that holds there
        for bit, ask in enumerate(self.facts):
            for p, holds in enumerate(ask(name)):
                facts[p] |= holds << bit
        if (at := self.first.get(facts[-1])) is None:
            at = self.first[facts[-1]] = self.reachable(self.starts, facts[-1])
        yield at
        for character, fact in zip(reversed(name), reversed(facts[:-1])):
            if (then := at.next.get((character, fact))) is None:
                then = at.next[character, fact] = self.step(at, character, fact)
            yield (at := then)

    def step(self, at: StateSet, character: str, fact: int) -> StateSet:
        """The set after one more character, at a place with these facts."""
        there = [then for test, then in map(self.states.__getitem__, at.waiting) if test(character)]
        self.steps += len(at.waiting)
        return self.reachable(there + self.starts if self.anywhere else there, fact)

    def reachable(self, states: list[int], fact: int) -> StateSet:
        """The set of the states that can be reached from `states` without a further character."""
        todo, seen, waiting, accepted = list(states), set(states), [], []
        while todo:
            what, then = self.states[here := todo.pop()]
            if callable(what):
                waiting.append(here)
                continue
            if what == -1:
                accepted.append(then)
                continue
            for state in then if what is None else [then] * (fact >> what & 1):
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        self.steps += len(seen)
        if self.steps > MOST_STEPS:
            raise ValueError(f"the patterns need more than {MOST_STEPS:,} steps on these names: write simpler ones")
        key = tuple(sorted(waiting)), tuple(sorted(accepted))
        return self.sets.setdefault(key, StateSet(*key))


def test_of(what, value) -> Callable[[str], bool]:
    """Whether a character is one that a literal, ``.`` or a class means."""
    if what is op.ANY:
        return "\n".__ne__
    if what in (op.LITERAL, op.NOT_LITERAL):
        return chr(value).__eq__ if what is op.LITERAL else chr(value).__ne__
    negated = value[0][0] is op.NEGATE
    tests = [test_of_part(*part) for part in value[negated:]]
    return lambda c: any(test(c) for test in tests) != negated


def test_of_part(what, value) -> Callable[[str], bool]:
    if what is op.CATEGORY:
        return CATEGORIES[value]
    first, last = value if what is op.RANGE else (value, value)
    return lambda c: first <= ord(c) <= last


def is_word(text: str) -> bool:
    r"""Whether a character is one of ``\w``; the empty text, beyond a name's end, is none."""
    return text.isalnum() or text == "_"
