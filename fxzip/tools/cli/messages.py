"""Messages of jsonargparse as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterator


def readable(message: str) -> str:
    """An error of jsonargparse without the names of its classes.

    >>> readable("Parser key \\"joint\\": Expected a <class 'bool'>. Got value: 3")
    '`joint`: expected a bool. Got value: 3.'
    """
    if "Union subtypes" in message:
        message = _of_union(message)
    text = re.sub(r'Parser key "([^"]*)":', r"`\1`:", message)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)':\s*", "", text)
    text = re.sub(r"Option '([^']*)' is not accepted", r"there is no key `\1`", text)
    text = " ".join(text.split()).replace(" a int", " an int")
    text = text.replace("typing.Literal", "one of ").replace("a NoneType", "null").replace(": Expected", ": expected")
    return re.sub(r"\.*\s*$", ".", text, count=1)


def _of_union(message: str) -> str:
    """What each of several types has against a value, without the value's insides."""
    head, _, body = message.partition("Does not validate")
    return f"{head.strip()} {'; '.join(dict.fromkeys(_reasons(body)))}"


def _reasons(body: str) -> Iterator[str]:
    skipped = (
        "against any of", "Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value",
        "Expected a <class 'NoneType'>", "Not of type Path_", "Expected a dot import path",
    )  # fmt: skip
    for line in body.splitlines():
        text = line.strip().removeprefix("- ").rstrip(".")
        if text.startswith("Given value: ") and "Namespace(" not in text and len(text) < 120:
            yield f"found {text.removeprefix('Given value: ')}"
        elif text and not text.startswith(skipped):
            yield text
