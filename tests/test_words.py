"""One vocabulary for the whole tree: the checks that a program can make.

    python tests/test_words.py gpt/configs README.md

prints the violations in those paths.
"""

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("gpt", "tests", "benchmarks", "hatch_build.py")
DOCUMENTS = ("README.md", "AGENTS.md", "CONTRIBUTING.md", "docs")
NOT_YET: tuple[str, ...] = ()
"""Path prefixes that are not checked yet."""

QUESTIONS = set("What Whether Where How Of By On".split())
"""First words of no docstring: it begins with the thing itself."""
NO_VERBS = set(
    """
    The A An All Any Both Each Every None No One Some Several Such Those These This That Two Its Their Our Your His
    It They We You He She Who Whose Which When While Why If As At By For From In Into Of On Onto Or Over Per Than Then
    To Under Until Up With Within Without After Before Between Beside Among About Not Only Just So And But There Here
    Also Else Still Yet Again
    """.split()
)
"""First words of no function's docstring: it begins with an imperative verb."""
VERBS_IN_S = set(
    """
    Access Address Assess Bias Bypass Canvas Compress Cross Decompress Discuss Dismiss Express Focus Guess Impress Miss
    Pass Possess Press Process Progress Reprocess Stress Suppress Toss Witness
    """.split()
)
PARTICIPLES = set(
    """
    allowed begun built changed chosen claimed closed continued converted counted cut_off damaged decided described done
    drawn excluded fitted forked found given held hidden joined kept known left listed loaded made mapped marked matched
    measured merged moved named needed opened packed paired parsed planned prepared quoted ranked reduced resolved
    saved scaled seen shown skipped sorted_by spread stored taken told trained unknown used written
    """.split()
)
"""Names of no function: it is named with an imperative verb."""
NOUN_DECORATORS = {"property", "cached_property", "setter", "fixture"}
"""Decorators of functions that are named with a noun, because they are used as values."""

NAMES = set(
    """
    layout Layout lay_out fitted sequences_limit halves nan_unless_finite linear_of MADE_AGAIN KEPT_LONGEST
    first_on_each_machine start_max naming_the_lost MOST_SEQUENCES BY_RATES BY_DROPOUT NOT_OF_WEIGHTS OF_ONE_START
    unlike_here BESIDE_TENSORS LOOK_AGAIN PATIENCE _dispensable doomed names_apart Aim Kill Course Pace Sight Life
    starter TOLD OverPreset make_ready tokenizer_note head_width
    told _told its kept made most least whole sound
    """.split()
)
"""Identifiers that were found wanting, and private words."""
NAMES_IN = {
    "gpt/ops/attention": {"QUERIES", "begins", "hidden", "visible"},
    "gpt/ops/cross_entropy": {"PIECE", "WORDS"},
    "gpt/utils/helper": {"si", "draw"},
}
"""Identifiers that have a better meaning elsewhere, by the files where they were found wanting."""
WRONG_SUPERLATIVE = re.compile(r"(^|_)(MOST|LEAST|LONGEST|LARGEST|SMALLEST)(_|$)")
"""Constants are bounds: MAX_ or MIN_."""

PHRASES = {
    r"products? of matrices": "matmul",
    r"(made|makes?|making) again": "recomputed",
    r"kept for (the )?backward( pass)?": "saved for backward",
    r"head(_| )width": "head_dim",
    r"MLP width": "intermediate_size",
    r"(whole|sound) checkpoints?": "valid checkpoint",
    r"checkpoints? that (is|are) (whole|sound)": "valid checkpoint",
    r"sets? aside": "moved aside",
    r"learnt": "learned",
    r"beside the training": "in the background",
    r"(left|leaves?) (it )?in peace": "reference run",
    r"untouched runs?": "reference run",
    r"continues? (a|the) run": "resume",
    r"told|tells?(?!\()": "report, raise, name",
    r"found at once": "O(1)",
    r"sent through again": "cycle-walking",
    r"text samples?": "sample",
    r"made(-| )up": "synthetic",
    r"leavings": "leftovers",
    r"(made|makes?) ready": "parallelized, compiled",
    r"machine at hand": "this machine",
    r"to the bit": "bit-exact",
}
"""Phrases that stand nowhere -> the field's word."""


def violations(path: Path) -> list[str]:
    """Return the violations in a file, as `path:line: message`."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8")
    found = list(_phrases(text)) if path != Path(__file__).resolve() else []
    if path.suffix == ".py":
        tree = ast.parse(text)
        found += _docstrings(tree)
        found += _names(tree, name)
    return [f"{name}:{line}: {message}" for line, message in sorted(set(found))]


def files_in(place: Path) -> list[Path]:
    """Return the files to check in a folder, or the file itself."""
    if place.is_file():
        return [place]
    return sorted(path for path in place.rglob("*") if path.suffix in (".py", ".c", ".md", ".sh"))


def _phrases(text: str) -> Iterator[tuple[int, str]]:
    for phrase, better in PHRASES.items():
        pattern = r"(?<![\w-])(?:" + phrase.replace(" ", r"[\s#*]+") + r")(?![\w-])"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            yield line, f"{' '.join(match[0].split())!r}: say {better}"


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            line = getattr(node, "lineno", 1)
            if docstring:
                yield from ((line, message) for message in _faults(docstring, node))
        body = getattr(node, "body", None)
        for before, after in itertools.pairwise(body if isinstance(body, list) else ()):
            if isinstance(before, ast.Assign | ast.AnnAssign) and _is_text(after):
                first = after.value.value.split()[:1]
                if first and first[0] in QUESTIONS:
                    yield after.lineno, f"text of an attribute begins with {first[0]}: name the thing"


def _faults(docstring: str, node: ast.AST) -> Iterator[str]:
    first_line = docstring.splitlines()[0]
    first = first_line.split()[0] if first_line.split() else ""
    if first in QUESTIONS:
        yield f"docstring begins with {first}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if not first_line.endswith("."):
            yield f"docstring's first line does not end with a period: {first_line!r}"
        if not _get_decorators(node) & (NOUN_DECORATORS - {"fixture"}):
            verb = re.match(r"[A-Z][a-z]+(?:-[a-z]+)*(?=[\s.,:;]|$)", first_line)
            if verb is None or verb[0] in NO_VERBS:
                yield f"docstring does not begin with an imperative verb: {first_line!r}"
            elif verb[0].endswith("s") and verb[0] not in VERBS_IN_S:
                yield f"docstring begins in the third person: {first_line!r}"
        arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
        for entry in re.findall(r"^ +(\*{0,2}\w+): of\b", arguments[1], re.MULTILINE) if arguments else ():
            yield f"Args: {entry} begins with 'of'"


def _get_decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _names(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    unwanted = NAMES.union(*(names for prefix, names in NAMES_IN.items() if file.startswith(prefix)))
    for node in ast.walk(tree):
        name = _name_of(node)
        if name in unwanted:
            yield node.lineno, f"name {name}"  # type: ignore[attr-defined]
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.name.strip("_") in PARTICIPLES and not _get_decorators(node) & NOUN_DECORATORS:
            yield node.lineno, f"function {node.name} is named with a participle"
        constant = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper()
        if constant and WRONG_SUPERLATIVE.search(node.id):
            yield node.lineno, f"constant {node.id}: MAX_ or MIN_"


def _name_of(node: ast.AST) -> str | None:
    """Return the identifier that a node binds or uses, if any."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
            return name.rpartition(".")[2]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.keyword(arg=str(name)):
            return name
    return None


def test_the_tree_speaks_one_vocabulary() -> None:
    files = [path for place in (*CODE, *DOCUMENTS) for path in files_in(ROOT / place)]
    checked = [path for path in files if not path.relative_to(ROOT).as_posix().startswith(NOT_YET)]
    found = [message for path in checked for message in violations(path)]
    assert not found, "\n".join([f"{len(found)} violations:", *found])


def test_violations_are_found() -> None:
    tree = ast.parse(
        'def kept(told):\n    """The steps"""\n\n\n'
        'def runs():\n    """Returns x.\n\n    Args:\n        a: of b\n    """\n'
        'MOST_X = 1\n"""Of all."""\n\n\nclass A:\n    """How it is."""\n'
    )
    messages = [message for _, message in [*_docstrings(tree), *_names(tree, "gpt/x.py")]]
    for part in (
        "'The steps'",
        "period: 'The steps'",
        "third person",
        "Args: a begins",
        "attribute begins with Of",
        "begins with How",
        "name told",
        "function kept",
        "constant MOST_X",
    ):
        assert any(part in message for message in messages), part
    assert [line for line, _ in _phrases("fine\nproducts\n    # of matrices, head_width, made-up\nuntold")] == [2, 3, 3]
    assert not list(_docstrings(ast.parse('def pass_on():\n    """All-reduce x."""\n')))


if __name__ == "__main__":
    shown = [m for place in sys.argv[1:] for path in files_in((Path.cwd() / place).resolve()) for m in violations(path)]
    print("\n".join(shown) or "no violations")
    sys.exit(bool(shown))
