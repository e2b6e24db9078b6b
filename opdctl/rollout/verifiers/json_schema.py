"""The answer is JSON that a schema accepts: tool calls, extraction, structured output.

Read with the standard library, validated by ``jsonschema``. Of an answer with a fenced block only
the last block is read. A schema refers to itself alone: nothing is fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.rollout.verifiers._answers import OneByOne, fenced


class JsonSchema(OneByOne):
    """The answer is JSON that passes a JSON schema: one for all rows, or a column's."""

    revision = 1
    needs_answer = False

    @dataclass(kw_only=True)
    class Config:
        """Keys of a schema."""

        schema: dict[str, Any] = key({}, "the schema of every answer; empty: each row has its own")
        schema_column: str = key("schema", "column of a row's own schema, JSON text or an object")

    @staticmethod
    def item(config, row: dict) -> dict:
        """What a row says of its answer.

        Raises:
            KeyError: it lacks the column.
            ValueError: it holds no schema.
        """
        import jsonschema

        if config.schema:
            return {}
        schema = row[config.schema_column]
        schema = json.loads(schema) if isinstance(schema, str) else schema
        try:
            jsonschema.validators.validator_for(schema).check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from None
        return {"schema": schema}

    @staticmethod
    def problems(config) -> list[Problem]:
        """What the schema cannot see."""
        import jsonschema

        try:
            jsonschema.validators.validator_for(config.schema).check_schema(config.schema)
        except jsonschema.SchemaError as error:
            return [Problem("schema", f"not a JSON schema: {error.message}", "type: object")]
        return []

    def right(self, prompt, answer: str) -> float:
        """Whether the answer is JSON and passes."""
        import jsonschema
        from referencing import Registry

        schema = self.config.schema or prompt.item["schema"]
        try:
            value = json.loads(fenced(answer))
        except (ValueError, RecursionError):
            return 0.0
        kind = jsonschema.validators.validator_for(schema)
        check = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)
        return check.is_valid(value)
