"""Grammars that llama.cpp could not follow are found before it tries."""

import time

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp.runtime import schema_grammar
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.grammars import check_grammar

FINE = {
    "literal": 'root ::= "yes" | "no"',
    "repeated": "root ::= [a-z]{0,2000} [0-9]*",
    "optional": 'root ::= ("x"?){100}',
    "recursive": 'root ::= "(" root ")" | item\nitem ::= [^()]+ root?',
    "comments": '# root ::= ((\nroot ::= "a" # (("x"?){999}){999}\n  | "[(\\"" | [(\\]]',
    "tokens": "root ::= <[1]> !<think>* .",
    "broken": 'root ::= ((("a"',
    "nothing": "",
}
DROWNING = {
    "nested": 'root ::= (((("x"?){100}){100}){100}){100}',
    "nested, open": 'root ::= (((("x"*){50,}){50,}){50,}){50}',
    "later": 'root ::= "begin" ((("x"?){50}){50}){50}',
    "by rules": "root ::= a{99} b\na ::= b{99}\nb ::= c{99}\nc ::= [x]?",
    "written out": "root ::= " + "a " * 80 + "\na ::= " + "b " * 80 + '\nb ::= "x"?',
    "alternatives": "root ::= " + " | ".join(["a"] * 100) + "\na ::= " + " | ".join(["[a]"] * 100),
    "empty": 'root ::= (((""){99}){99}){99}',
    "itself": 'root ::= root "x" | "y"',
}


@pytest.mark.parametrize("grammar", FINE.values(), ids=FINE)
def test_ordinary_grammars_pass(grammar: str) -> None:
    check_grammar(grammar)


@pytest.mark.parametrize("grammar", DROWNING.values(), ids=DROWNING)
def test_drowning_ones_do_not(grammar: str) -> None:
    with pytest.raises(UsageError, match="ways to go on"):
        check_grammar(grammar)


def test_large_schemas_pass(native: NativeBuild) -> None:
    many = {f"p{n}": {"type": "string", "maxLength": 300} for n in range(100)}
    grammar = schema_grammar({"type": "object", "properties": many})
    check_grammar(grammar)
    assert "char{0,300}" in grammar


def test_looking_takes_no_time() -> None:
    """Whatever it is asked: what is longest without being refused, and worse."""
    rules = [f"a{n} ::= a{n + 1}? [x]?" for n in range(3000)]
    worst = ["root ::= " + "[x]? " * 20_000, "\n".join(["root ::= a0", *rules, "a3000 ::= [x]"])]
    for grammar in worst:
        started = time.process_time()
        with pytest.raises(UsageError):
            check_grammar(grammar)
        assert time.process_time() - started < 30


def test_json_strings_have_no_line_breaks(native: NativeBuild) -> None:
    assert r"\x00-\x1F" in schema_grammar({"type": "string"})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"minItems": 10**9}},
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
        {"enum": list(range(30_000))},
        {"$ref": "http://elsewhere/schema"},
        {"type": "odd"},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_that_explode_are_refused(native: NativeBuild, schema: object) -> None:
    with pytest.raises(UsageError, match="JSON schema"):
        schema_grammar(schema)
