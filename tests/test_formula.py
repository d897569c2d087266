"""Formulas: arithmetic as Python's, errors that point at the place, and nothing else whatever is typed."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.formula import MAX_DEPTH, MAX_LENGTH, evaluate, names_in

VALUES = {"a": 2.0, "b": -3.5, "small_tuned": 0.125, "tiny-base": 5.0, "größe": 7.0}
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}


def broken(formula, values=VALUES, what="model"):
    """The problem, its character (from 1), and the hint; the caret must stand under that character."""
    with pytest.raises(SurgeryError) as raised:
        evaluate(formula, values, what)
    problem, shown, caret = raised.value.problem.split("\n")
    told, at = re.fullmatch(r"(.*), at character (\d+) of the formula:", problem).groups()
    assert re.fullmatch(r" *\^", caret) and shown.startswith("  ")
    return told, int(at), raised.value.hint or "", shown[2:], len(caret) - 3


# ---- as Python ------------------------------------------------------------------------------------------------------

numerals = st.sampled_from(["0", "1", "2", "3.5", ".5", "4.", "1e-3", "2E+2", "0.1", "17"])
numbers = st.recursive(
    numerals,
    lambda inner: st.tuples(st.just("negative"), inner) | st.tuples(st.sampled_from("+-*/"), inner, inner),
    max_leaves=4,
)
models = st.recursive(
    st.sampled_from(list(VALUES)),
    lambda inner: (
        st.tuples(st.just("negative"), inner)
        | st.tuples(st.sampled_from("+-"), inner, inner)
        | st.tuples(st.just("*"), numbers, inner)
        | st.tuples(st.sampled_from("*/"), inner, numbers)
    ),
    max_leaves=12,
)


def rendered(tree, data):
    """(text for us, text for Python) of an expression, with spaces and brackets that are not needed here and there."""
    if isinstance(tree, str):
        quote = data.draw(st.sampled_from("'\"" if tree == "tiny-base" else ["'", '"', "", ""]))
        return (quote + tree + quote, f"values['{tree}']") if tree in VALUES else (tree, f"float({tree})")
    sign, *parts = tree
    texts = [rendered(part, data) for part in parts]
    for i, part in enumerate(parts):
        level = 4 if isinstance(part, str) else LEVEL[part[0]]
        if level < LEVEL[sign] + i or data.draw(st.integers(0, 9)) == 0:
            texts[i] = tuple(f"({text})" for text in texts[i])
    space = data.draw(st.sampled_from(["", "", " ", "  ", "\t"]))
    if sign == "negative":
        return tuple("-" + space + text for text in texts[0])
    return tuple(left + space + sign + space + right for left, right in zip(*texts, strict=True))


@given(models, st.data(), st.sampled_from([float, Fraction]))
def test_a_formula_comes_to_what_python_makes_of_it(tree, data, kind):
    ours, python = rendered(tree, data)
    values = {name: kind(value) for name, value in VALUES.items()}
    try:
        expected = eval(python, {"values": values})
    except ZeroDivisionError:
        assert "division by zero" in broken(ours, values)[0]
        return
    found = evaluate(ours, values)
    assert found == expected and type(found) is type(expected)
    assert names_in(ours) == list(dict.fromkeys(re.findall(r"values\['(.*?)'\]", python)))


def test_what_is_not_arithmetic_is_the_same_as_in_python():
    assert evaluate("a", VALUES) == 2.0 and evaluate(" (( a\n)) ", VALUES) == 2.0
    assert evaluate("a - b - a", VALUES) == 3.5 and evaluate("8 / 4 / 2 * a", VALUES) == 2.0
    assert evaluate("-2*-a + +a", VALUES) == 6.0 and evaluate("a--b", VALUES) == -1.5
    assert evaluate("'tiny-base' + 0.5*(small_tuned - größe)", VALUES) == 5 + 0.5 * (0.125 - 7)
    assert names_in("b - a + b + 'x/y.z'") == ["b", "a", "x/y.z"]


def test_the_operators_are_those_of_the_values():
    forms = {
        "add": "({} + {})",
        "sub": "({} - {})",
        "neg": "-{}",
        "mul": "{}*{}",
        "rmul": "{1}*{0}",
        "truediv": "{}/{}",
    }
    methods = {f"__{name}__": lambda *parts, form=form: Words(form.format(*parts)) for name, form in forms.items()}
    Words = type("Words", (str,), methods)
    values = {"x": Words("x"), "y": Words("y")}
    assert evaluate("2*x - -(y/4)*3 + x", values) == "((2.0*x - -y/4.0*3.0) + x)"


# ---- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "at", "told", "hint"),
    [
        ("a + ?", 5, "can't hold '?'", "Names, numbers"),
        ("a − b", 3, "can't hold '−'", "minus is written -"),
        ("2 × a", 3, "can't hold '×'", "Times is written *"),
        ("a.save('x')", 2, "can't hold '.'", "quoted"),
        ("a[0]", 2, "can't hold '['", "round"),
        ("0,5*a", 2, "can't hold ','", "point"),
        ("a = b", 3, "can't hold '='", "outside"),
        ("a\x1b", 2, "can't hold '\ufffd'", ""),
        ("b + small_tund", 5, "no model 'small_tund'", "Did you mean 'small_tuned'? Or add small_tund=PATH."),
        ("a - tiny-base", 5, "no model 'tiny'", "'tiny-base'"),
        ("a - 'nosuch'", 5, "no model 'nosuch'", "Or add nosuch=PATH"),
        ("(a + (b - a)", 1, "never closed", ""),
        ("a + b)", 6, "closes none", ""),
        ("(a + b", 1, "never closed", ""),
        ("2a", 2, "operator is missing before 'a'", "+ - * /"),
        ("a b", 3, "operator is missing before 'b'", "+ - * /"),
        ("2(a + b)", 2, "operator is missing before '('", "+ - * /"),
        ("(a 'tiny-base')", 4, "operator is missing before 'tiny-base'", ""),
        ("1.2.3*a", 4, "operator is missing before '.3'", ""),
        ("large.2 + a", 6, "operator is missing before '.2'", "quoted"),
        ("1_0*a", 2, "operator is missing before '_0'", ""),
        ("__import__('os')", 11, "operator is missing before '('", ""),
        ("a +", 4, "ends where", ""),
        ("a + * b", 5, "is missing before '*'", ""),
        ("a ** b", 4, "is missing before '*'", "no powers"),
        ("()", 2, "is missing before ')'", ""),
        ("* a", 1, "is missing before '*'", ""),
        ("a + 'b", 5, "quotation mark is never closed", ""),
        ("a + ''", 5, "name is missing", ""),
        ("a / 0", 5, "division by zero", ""),
        ("a / (1 - 1)", 5, "division by zero", ""),
        ("2 / a", 5, "divided by a model", ""),
        ("models/a", 8, "divided by a model", "quoted"),
        ("a * b", 3, "multiplied by a model", "Numbers"),
        ("a * (b + b)", 3, "multiplied by a model", "Numbers"),
        ("a + 2*3", 5, "A number can't be added", "Numbers"),
        ("0 - a", 1, "A number can't be added", "Numbers"),
        ("  2 * 3", 3, "comes to a number", ""),
        ("a + 1e999*b", 5, "too large", ""),
        ("1e300*1e300*a", 6, "infinity", ""),
        ("(" * 101 + "a" + ")" * 101, 101, "nested more than 100 deep", ""),
    ],
)
def test_errors_point_at_the_place(formula, at, told, hint):
    problem, where, said, shown, column = broken(formula)
    assert told in problem and hint in said and where == at
    if len(formula) < 100:
        assert shown == formula.replace("\x1b", "\ufffd") and column == at - 1


def test_the_word_for_a_value_is_the_callers():
    assert "a vector can't be multiplied by a vector" in broken("a*b", what="vector")[0].lower()
    assert broken("a", {}, "vector")[2] == "Add a=PATH."


def test_an_empty_formula():
    for text in ("", " \n"):
        with pytest.raises(SurgeryError, match="empty"):
            evaluate(text, VALUES)


def test_names_are_checked_without_values():
    assert names_in("a + nosuch") == ["a", "nosuch"]
    with pytest.raises(SurgeryError, match="'nosuch', at character 5"):
        names_in("a + nosuch", ["a", "b"])
    with pytest.raises(SurgeryError, match="multiplied by a vector"):
        names_in("a*b", what="vector")


def test_values_that_do_not_go_together_are_told_at_the_operator():
    problem, at, *_ = broken("2*a - b", {"a": 1.0, "b": "text"})
    assert "computed with these models" in problem and at == 5


def test_a_long_formula_is_shown_around_the_place():
    _, at, _, shown, column = broken("a + " * 200 + "? + " + "a + " * 200 + "a")
    assert (
        at == 801 and shown[column] == "?" and len(shown) == 106 and shown.startswith("...") and shown.endswith("...")
    )


def test_wide_characters_take_two_columns():
    _, at, _, shown, column = broken("größe + '大' + ?", VALUES | {"大": 1.0})
    assert at == 15 and column == 15 and shown == "größe + '大' + ?"


def test_formulas_too_deep_or_too_long_are_refused_and_others_are_not():
    deep = "(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH
    assert evaluate(deep, VALUES) == 2.0 and evaluate("-" * 999 + "a", VALUES) == -2.0
    long = "+".join(["a"] * 5_000)
    assert len(long) <= MAX_LENGTH and evaluate(long, VALUES) == 10_000.0
    for text in (f"({deep})", "(" * 5_000 + "a" + ")" * 5_000, "-" * 100_000 + "a", "+".join(["a"] * 50_000)):
        with pytest.raises(SurgeryError):
            evaluate(text, VALUES)


@given(st.text(max_size=60) | st.text(alphabet="ab0123456789.e+-*/() ,[]'\"_=:x\\\n", max_size=40))
def test_whatever_is_typed_gives_a_value_or_an_error_that_points(text):
    try:
        names = names_in(text, VALUES)
    except SurgeryError:
        if text.strip():
            _, at, _, shown, column = broken(text)
            here = text[at - 1] if at <= len(text) else None
            assert shown[column : column + 1] in (here or "", "\ufffd", " ") or not text.isascii()
        return
    assert set(names) <= set(VALUES) and isinstance(evaluate(text, VALUES), float)
