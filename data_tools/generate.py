"""Generate text from a native checkpoint, without converting it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.common import ToolParser, run_tool
from data_tools.tokenizer_flags import add_tokenizer_flags, tokenizer_from_args
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.checkpoint.manifest import TOKENIZER
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.generation.chat import ChatTemplate, find_chat_template
from megatron_llmjp.generation.checkpoints import find_native_checkpoint
from megatron_llmjp.generation.prompts import PromptEncoder, open_prompt_encoder
from megatron_llmjp.generation.records import (
    OUTPUT_KEYS,
    read_records,
    text_input,
    text_output,
    write_json_line,
)
from megatron_llmjp.generation.requests import Request, parse_request, read_json_values
from megatron_llmjp.generation.settings import DEFAULT_NEW_TOKENS, GenerationSettings
from megatron_llmjp.large_imports import large_imports

if TYPE_CHECKING:
    from megatron_llmjp.generation.text_generator import TextGenerator

EXAMPLES = """\
  Continue a text with the newest checkpoint of a run, the most probable token each time:
    generate --load checkpoints/7b --prompt "Once upon a time"

  Draw tokens at random:
    generate --load checkpoints/7b --prompt "Once upon a time" --temperature 0.7 --top-p 0.95

  Continue the prompts of a file, 16 at a time; each line is a text or {"prompt": "..."}:
    generate --load checkpoints/7b --input prompts.jsonl --output texts.jsonl --batch-size 16

  Chat with an instruction-tuned model:
    generate --load checkpoints/7b-instruct --chat

  Answer requests of the form {"input_data": {"input_string": [...], "parameters": {...}}}:
    generate --load checkpoints/7b --requests request.json

"""
MODES = ("prompt", "input", "requests")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "generate", "Generate text from a native checkpoint, in one process.", EXAMPLES
    )
    _add_flags(parser)
    args = parser.parse(argv)
    given = [f"--{mode}" for mode in MODES if getattr(args, mode) is not None]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} are mutually exclusive")
    if not given and not args.chat:
        parser.error("expected --prompt, --input, --requests or --chat")
    if args.output is not None and args.prompt is not None:
        parser.error("--output requires --input or --requests")
    if args.chat and args.requests is not None:
        parser.error("--chat and --requests are mutually exclusive")
    if args.output not in (None, "-") and args.output in (args.input, args.requests):
        parser.error(f"--output {args.output}: is the input; choose another file")
    return run_tool("generate", lambda: _run(args))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--load",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="native checkpoint, or folder of a run, whose newest checkpoint is used",
    )
    add("--prompt", metavar="TEXT", help="text to continue; the output is printed as it grows")
    add("--input", metavar="FILE", help="JSON lines with prompts; - for standard input")
    add("--requests", metavar="FILE", help="requests as JSON or JSON lines; - for standard input")
    add("--output", metavar="FILE", help="JSON lines with texts (default: standard output)")
    add("--chat", action="store_true", help="use the checkpoint's chat template")
    add("--system", metavar="TEXT", help="system message of a chat")
    add("--full-text", action="store_true", help="print the prompt, too")
    _add_sampling_flags(parser.add_argument_group("choice of tokens").add_argument)
    add = parser.add_argument_group("model").add_argument
    add("--batch-size", type=positive_int, default=8, metavar="N", help="prompts per batch")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: fp32 on a CPU, the checkpoint's on a GPU)",
    )
    add("--device", choices=("auto", "cpu"), default="auto", help="auto uses a GPU if there is one")
    add("--add-bos", action="store_true", help="write BOS before each prompt")
    add = parser.add_argument_group("tokenizer (default: the checkpoint's)").add_argument
    add_tokenizer_flags(add, required=False)


def _add_sampling_flags(add: Callable[..., Any]) -> None:
    add(
        "--max-new-tokens",
        type=positive_int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help="largest number of generated tokens",
    )
    add("--temperature", type=float, metavar="X", help="draw tokens; divisor of the logits")
    add("--top-k", type=int, metavar="N", help="draw from the N most probable tokens")
    add("--top-p", type=float, metavar="P", help="draw from the most probable tokens up to P")
    add("--do-sample", action="store_true", help="draw tokens without any of these three")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: make earlier tokens less probable",
    )
    add("--seed", type=int, default=GenerationSettings.seed, metavar="N", help="random seed")


def _settings(args: argparse.Namespace) -> GenerationSettings:
    """Return the settings given by the flags."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: getattr(args, name) for name in names}
    given["do_sample"] = True if args.do_sample else None
    try:
        return GenerationSettings.of_given(
            {name: value for name, value in given.items() if value is not None}
        )
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}{colon}{rest}") from None


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    folder = find_native_checkpoint(args.load)
    template = _chat_template(folder) if args.chat else None
    tokenizer = tokenizer_from_args(args) if args.tokenizer_type is not None else None
    prompts = open_prompt_encoder(folder, tokenizer, args.add_bos)
    program = _Program(args, settings, folder, prompts)
    if args.input is not None:
        return program.continue_records(template)
    if args.requests is not None:
        return program.answer_requests()
    if template is None:
        return program.continue_prompt(args.prompt)
    if args.prompt is None:
        return program.chat(template)
    return program.continue_prompt(template.render(_messages(args.system, args.prompt)))


def _chat_template(folder: Path) -> ChatTemplate:
    template = find_chat_template(folder / TOKENIZER)
    if template is None:
        raise UserError(
            f"--chat: {folder} has no chat template: store one by convert_checkpoint "
            "--chat-template FILE, or omit --chat and write the whole prompt"
        )
    return template


def _messages(system: str | None, prompt: str) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


@dataclass(frozen=True)
class _Program:
    """The modes of the program; prompts are checked before the model is loaded."""

    args: argparse.Namespace
    settings: GenerationSettings
    folder: Path
    prompts: PromptEncoder

    def load(self) -> TextGenerator:
        with large_imports():
            from megatron_llmjp.generation.text_generator import TextGenerator
            from megatron_llmjp.inference.native_model import load_native_model

        model = load_native_model(self.folder, self.args.dtype, self.args.device)
        return TextGenerator(model, self.prompts)

    def continue_prompt(self, prompt: str) -> int:
        ids = self.prompts.encode(prompt, "--prompt")
        generator = self.load()
        if self.args.full_text:
            print(prompt, end="", flush=True)
        self._print_text(generator, ids)
        return EXIT_DONE

    def _print_text(self, generator: TextGenerator, prompt: list[int]) -> str:
        """Print the continuation of a prompt as it grows, and return it."""
        parts = []
        for part in generator.stream(prompt, self.settings):
            parts.append(part)
            print(part, end="", flush=True)
        print(flush=True)
        return "".join(parts)

    def continue_records(self, template: ChatTemplate | None) -> int:
        args = self.args
        with text_input(args.input) as stream:
            records = read_records(stream, args.input, template)
        ids = [self.prompts.encode(record.prompt, record.where) for record in records]
        with text_output(args.output) as output:
            found = self.load().complete(ids, self.settings, args.batch_size)
            for record, completion in zip(records, found, strict=True):
                values = (
                    record.prompt * args.full_text + completion.text,
                    completion.finish_reason,
                    completion.prompt_tokens,
                    len(completion.token_ids),
                )
                new = dict(zip(OUTPUT_KEYS, values, strict=True))
                write_json_line(output, {**record.content, **new})
        return EXIT_DONE

    def answer_requests(self) -> int:
        args = self.args
        with text_input(args.requests) as stream, text_output(args.output) as output:
            found = (
                self._encode_request(parse_request(value, self.settings, where))
                for where, value in read_json_values(stream, args.requests)
            )
            # Those of standard input may be written after the response to earlier ones.
            requests = found if args.requests == "-" else list(found)
            generator = None
            for request, ids in requests:
                generator = generator or self.load()
                texts = [c.text for c in generator.complete(ids, request.settings, args.batch_size)]
                write_json_line(output, request.response(texts))
        return EXIT_DONE

    def _encode_request(self, request: Request) -> tuple[Request, list[list[int]]]:
        return request, [
            self.prompts.encode(prompt, f"{request.where}: input_string[{number}]")
            for number, prompt in enumerate(request.prompts)
        ]

    def chat(self, template: ChatTemplate) -> int:
        """Answer messages from standard input, one per line, until its end."""
        generator = self.load()
        messages: list[dict[str, Any]] = []
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return EXIT_DONE
            if not line.strip():
                continue
            new = _messages(None if messages else self.args.system, line.rstrip("\n"))
            messages += new
            prompt = self.prompts.encode(template.render(messages), "the conversation")
            messages.append({"role": "assistant", "content": self._print_text(generator, prompt)})


if __name__ == "__main__":
    sys.exit(main())
