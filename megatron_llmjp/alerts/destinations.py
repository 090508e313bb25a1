"""Where alerts are sent: flags, configuration or environment variables.

URLs of webhooks are secrets: who knows one can post to the channel. They are neither printed nor
stored with the configuration.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pydantic import SecretStr

from megatron_llmjp.arguments import normalize_dashes
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import LoggingConfig
from megatron_llmjp.errors import UserError

WEBHOOK_VARIABLE = "MEGATRON_LLMJP_ALERT_WEBHOOK"
COMMAND_VARIABLE = "MEGATRON_LLMJP_ALERT_COMMAND"


@dataclass(frozen=True)
class Destinations:
    """Destinations of alerts; None for those that are not configured."""

    webhook: str | None = field(default=None, repr=False)
    """URL that receives a POST request with a JSON object."""
    command: str | None = field(default=None, repr=False)
    """Shell command that receives the JSON object on its standard input."""

    def __bool__(self) -> bool:
        """Return whether any is configured."""
        return bool(self.webhook or self.command)

    @property
    def webhook_name(self) -> str:
        """The host of the webhook, which is not a secret."""
        try:
            return f"webhook on {urlsplit(self.webhook or '').hostname}"
        except ValueError:
            return "webhook"


def find_destinations(logging: LoggingConfig, env: Mapping[str, str] = os.environ) -> Destinations:
    """Return the destinations of a configuration; environment variables apply below it."""
    return Destinations(
        _secret(logging.alert_webhook) or env.get(WEBHOOK_VARIABLE) or None,
        _secret(logging.alert_command) or env.get(COMMAND_VARIABLE) or None,
    )


def destinations_of_arguments(
    argv: Sequence[str], env: Mapping[str, str] = os.environ
) -> Destinations:
    """Return the destinations of a run by its arguments, as far as these are valid."""
    try:
        return find_destinations(parse(argv).config.logging, env)
    except UserError:  # which may be the reason of the alert
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
        parser.add_argument("--alert-webhook", type=SecretStr)
        parser.add_argument("--alert-command", type=SecretStr)
        try:
            given, _ = parser.parse_known_args(normalize_dashes(argv))
        except argparse.ArgumentError:
            given = argparse.Namespace()
        return find_destinations(LoggingConfig(**vars(given)), env)


def _secret(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value is not None else None
