"""Sums worked out through tools: an expression becomes a chain of calls, each using the result of the one before."""

import json
from dataclasses import dataclass
from typing import TypeAlias

from .chat import tool_free_exchange
from .dialogue import Call, Dialogue, Json
from .known_tool import KnownTool
from .resources import by_language
from .source import Language, Source
from .tool import function_name
from .toolbox import offer

NAMES = {
    "+": ("add", "plus", "sum", "addition", "add_numbers", "sum_two", "adder", "calc_add"),
    "-": ("sub", "subtract", "minus", "difference", "subtraction", "sub_numbers", "deduct"),
    "*": ("mul", "multiply", "times", "product", "multiplication", "mul_numbers", "mult"),
    "/": ("div", "divide", "quotient", "division", "div_numbers", "divide_by"),
}
DESCRIPTIONS = {
    "+": (
        ("Add two numbers", "两数相加"),
        ("Return the sum of two numbers", "加法"),
        ("Adds a and b", "计算两个数的和"),
        ("addition", "求和"),
    ),
    "-": (
        ("Subtract the second number from the first", "两数相减"),
        ("Return the difference", "减法"),
        ("Subtract", "计算两个数的差"),
    ),
    "*": (
        ("Multiply two numbers", "两数相乘"),
        ("Return the product of two numbers", "乘法"),
        ("multiplication", "计算两个数的积"),
    ),
    "/": (
        ("Divide the first number by the second", "两数相除"),
        ("Return the quotient", "除法"),
        ("Division", "计算两个数的商"),
    ),
}
OPERANDS = (
    ("a", "b"),
    ("a", "b"),
    ("x", "y"),
    ("num1", "num2"),
    ("first", "second"),
    ("left", "right"),
    ("m", "n"),
    ("n1", "n2"),
    ("p", "q"),
    ("lhs", "rhs"),
)
REQUESTS = by_language("sum requests")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
WORDS = {
    "en": {"+": "plus", "-": "minus", "*": "times", "/": "divided by"},
    "zh": {"+": "加", "-": "减", "*": "乘以", "/": "除以"},
}

Number = int | float
Expression: TypeAlias = "Number | Operation"


@dataclass(frozen=True, slots=True)
class Operation:
    """A binary operation on numbers or operations."""

    operator: str
    left: Expression
    right: Expression


def apply(operator: str, left: Number, right: Number) -> Number:
    """Compute one step; results are rounded so that they print shortly, and whole ones are integers."""
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if operator == "/" else 0}[
        operator
    ]
    result = round(result, 4)
    return int(result) if result == int(result) else result


def evaluate(expression: Expression) -> Number:
    """Return the value of an expression."""
    if not isinstance(expression, Operation):
        return expression
    return apply(expression.operator, evaluate(expression.left), evaluate(expression.right))


def steps(expression: Expression) -> list[tuple[str, Number, Number]]:
    """Return the operations in the order they are worked out: operands first, left before right."""
    if not isinstance(expression, Operation):
        return []
    own = (expression.operator, evaluate(expression.left), evaluate(expression.right))
    return [*steps(expression.left), *steps(expression.right), own]


def written(expression: Expression, spaced: bool) -> str:
    """Write an expression with the parentheses it needs."""
    if not isinstance(expression, Operation):
        return str(expression) if expression >= 0 else f"({expression})"
    left, right = written(expression.left, spaced), written(expression.right, spaced)
    rank = PRECEDENCE[expression.operator]
    if isinstance(expression.left, Operation) and PRECEDENCE[expression.left.operator] < rank:
        left = f"({left})"
    if isinstance(expression.right, Operation) and PRECEDENCE[expression.right.operator] <= rank:
        right = f"({right})"
    gap = " " if spaced else ""
    return f"{left}{gap}{expression.operator}{gap}{right}"


def _number(source: Source) -> Number:
    if source.chance(0.1):
        return round(source.random.uniform(0, 100), source.integer(1, 2))
    number = source.integer(0, 10 ** source.choice((1, 1, 1, 2, 2, 3, 4)))
    return -number if source.chance(0.05) else number


def _expression(source: Source, operations: int, operators: str) -> Expression:
    if operations == 0:
        return _number(source)
    left = source.integer(0, operations - 1) if source.chance(0.4) else operations - 1
    operator = source.choice(operators)
    one, two = _expression(source, left, operators), _expression(source, operations - 1 - left, operators)
    if operator == "/":
        two = source.integer(1, 9) if evaluate(two) == 0 or source.chance(0.5) else two
        if source.chance(0.7) and not isinstance(one, Operation) and isinstance(two, int):
            one = two * source.integer(1, 30)
    return Operation(operator, one, two)


@dataclass(slots=True)
class Calculator:
    """Arithmetic tools of one dialogue: a function name and operand names for each operator."""

    names: dict[str, str]
    operands: dict[str, tuple[str, str]]
    schemas: list[Json]

    def call(self, operator: str, left: Number, right: Number) -> Call:
        first, second = self.operands[operator]
        if isinstance(left, float) or isinstance(right, float):
            self._take_fractions(self.names[operator])
        return Call(self.names[operator], {first: left, second: right})

    def _take_fractions(self, name: str) -> None:
        """Have a function's operands declared such that its calls obey its schema."""
        for schema in self.schemas:
            if schema["name"] == name:
                for operand in schema["parameters"]["properties"].values():
                    operand["type"] = "number"


def _calculator(source: Source, language: Language, operators: str) -> Calculator:
    shared = source.choice(OPERANDS)
    kind = source.choice(("integer", "integer", "number", "number"))
    names, operands, schemas = {}, {}, []
    described = source.chance(0.6)
    for operator in operators:
        base = source.choice(NAMES[operator]) if source.chance(0.9) else source.invented()
        names[operator] = function_name(source, base)
        operands[operator] = source.choice(OPERANDS) if source.chance(0.1) else shared
        pair = source.choice(DESCRIPTIONS[operator])
        labels = {"en": ("the first number", "the second number"), "zh": ("第一个数", "第二个数")}[language]
        properties = {}
        for name, label in zip(operands[operator], labels, strict=True):
            properties[name] = {"type": kind, "description": label} if described else {"type": kind}
        schema: Json = {"name": names[operator], "description": pair[1 if language == "zh" else 0]}
        schema["parameters"] = {"type": "object", "properties": properties, "required": list(operands[operator])}
        schemas.append(schema)
    return Calculator(names, operands, schemas)


def _spoken(source: Source, language: Language, expression: Expression) -> str:
    text = written(expression, source.chance(0.3))
    simple = (
        isinstance(expression, Operation)
        and not isinstance(expression.left, Operation)
        and not isinstance(expression.right, Operation)
    )
    if isinstance(expression, Operation) and simple and source.chance(0.4):
        text = (
            f"{expression.left} {WORDS['en'][expression.operator]} {expression.right}"
            if language == "en"
            else f"{expression.left}{WORDS['zh'][expression.operator]}{expression.right}"
        )
    if source.chance(0.1):
        text = text.replace("*", "×").replace("/", "÷")
    return source.choice(REQUESTS[language]).format(text)


def _result(source: Source, style: int, operator: str, left: Number, right: Number, value: Number) -> str:
    forms = (
        f"{left}{operator}{right}={value}",
        str(value),
        json.dumps({"result": value}),
        f"{left} {operator} {right} = {value}",
        json.dumps({"value": value}),
        f"result: {value}",
        json.dumps({"status": "ok", "result": value}),
    )
    return forms[style] if source.chance(0.9) else source.choice(forms)


def _final(source: Source, language: Language, question: str, value: Number) -> str:
    if language == "zh":
        return source.choice((f"结果是{value}。", f"答案是{value}。", f"计算结果是{value}。", f"等于{value}。"))
    return source.choice(
        (f"The result is {value}.", f"The answer is {value}.", f"It is {value}.", f"The result is {value}.")
    )


def arithmetic_dialogue(source: Source, language: Language) -> Dialogue:
    """Return a dialogue of one to three expressions worked out by calls."""
    dialogue = Dialogue("arithmetic", language)
    operators = "".join(source.random.sample("+-*/", source.choice((1, 2, 2, 2, 3, 4, 4))))
    calculator = _calculator(source, language, operators)
    schemas = calculator.schemas + (_others(source, language) if source.chance(0.25) else [])
    source.random.shuffle(schemas)
    dialogue.tools = schemas
    style = source.integer(0, 6)
    for _ in range(source.choice((1, 1, 2, 3))):
        if source.chance(0.1):
            tool_free_exchange(source, dialogue)
        expression = _expression(source, source.choice((1, 1, 2, 2, 2, 3)), operators)
        if max(abs(value) for step in steps(expression) for value in (*step[1:], apply(*step))) > 10**9:
            continue
        _work_out(source, dialogue, calculator, expression, style)
    if not any(turn.calls for turn in dialogue.turns):
        _work_out(source, dialogue, calculator, Operation(operators[0], 3, 5), style)
    return dialogue


def _others(source: Source, language: Language) -> list[Json]:
    """Return tools that have nothing to do with sums."""
    return [
        tool.schema
        for tool in offer(source, language)[:3]
        if not isinstance(tool, KnownTool) or "calculator" not in tool.concept.names
    ]


def _work_out(source: Source, dialogue: Dialogue, calculator: Calculator, expression: Expression, style: int) -> None:
    question = _spoken(source, dialogue.language, expression)
    value: Number = 0
    for index, (operator, left, right) in enumerate(steps(expression)):
        call = calculator.call(operator, left, right)
        if index == 0:
            dialogue.say(question, "", call)
        else:
            dialogue.answer("", call)
        value = apply(operator, left, right)
        dialogue.result(_result(source, style, operator, left, right, value))
    dialogue.answer(_final(source, dialogue.language, question, value))
