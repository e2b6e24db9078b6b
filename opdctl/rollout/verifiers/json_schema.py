"""The answer is JSON that a schema accepts: tool calls, extraction, structured output.

JSON is read with the standard library and validated by ``jsonschema``. Of an answer with fenced
blocks only the last is read. A schema can refer to itself alone: nothing is fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier, last_fenced_block


class JsonSchema(SingleAnswerVerifier):
    """The answer is JSON that passes a JSON schema: one for all rows, or a column's."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of a schema."""

        schema: dict[str, Any] = key({}, "the schema of every answer; empty: each row has its own")
        schema_column: str = key("schema", "column of a row's own schema, JSON text or an object")

    @staticmethod
    def needs_answer(config) -> bool:
        """Return False: the schema decides."""
        return False

    @staticmethod
    def item(config, row: dict) -> dict:
        """Return a row's own schema, unless all rows have one.

        Raises:
            KeyError: the row lacks the column.
            ValueError: the column holds no schema.
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
        """Return what the recipe's schema cannot check of the keys."""
        import jsonschema

        try:
            jsonschema.validators.validator_for(config.schema).check_schema(config.schema)
        except jsonschema.SchemaError as error:
            return [Problem("schema", f"not a JSON schema: {error.message}", "type: object")]
        return []

    def grade(self, prompt, answer: str) -> float:
        """Return 1 if the answer is JSON and passes the schema, else 0."""
        import jsonschema
        from referencing import Registry

        schema = self.config.schema or prompt.item["schema"]
        try:
            value = json.loads(last_fenced_block(answer))
        except (ValueError, RecursionError):
            return 0.0
        kind = jsonschema.validators.validator_for(schema)
        check = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)
        return check.is_valid(value)
