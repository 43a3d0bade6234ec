"""``python -m runtime.generate``: text, or token ids, from a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from runtime.errors import ConfigError, Parser, run_cli

_DESCRIPTION = """Generate text with a Qwen3 checkpoint. The engine is built on first use and cached.

Without sampling options the likeliest token is always taken. --temperature or --top-p switch sampling on, from all
tokens unless --top-k says fewer; the same --seed then gives the same answer.
"""
_EXAMPLES = """examples:
  python -m runtime.generate examples/tiny-qwen3 --chat --prompt "123+456="
  python -m runtime.generate MODEL_DIR --chat --stream --max-steps 300 --temperature 0.7 --top-p 0.8 --top-k 20 --prompt "Hello"
  python -m runtime.generate --build build/cpu --tokens 1,2,3 --json
"""
_NO_LIMIT = 2**31 - 1  # the model takes the smaller of this and its vocabulary


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command which loads a model has."""
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="Hugging Face folder; not needed with --build")
    parser.add_argument(
        "--build", metavar="OUT", help="a folder made by python -m codegen build (default: build and cache one)"
    )
    parser.add_argument(
        "--device",
        help="cpu, nvidia, cambricon, ascend, metax, moore, iluvatar, kunlun, hygon, qy, ali (default: the build's own, or cpu)",
    )
    parser.add_argument("--dtype", help="f32, f16 or bf16 (default: the checkpoint's own)")
    parser.add_argument("--quant", default="none", help="as for codegen build; only without --build (default: none)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of the embedded InfiniCore (default: all cores)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="context length (default: all that was compiled for)"
    )
    parser.add_argument("--ndev", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")
    parser.add_argument("--dev-ids", metavar="0,1", help="which devices (default: the first N)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed arguments as keyword arguments of Qwen3ForCausalLM."""
    if args.model is None and args.build is None:
        raise ConfigError("MODEL_DIR is missing: give a Hugging Face folder, or --build with a build folder")
    return dict(
        model_dir_path=args.model,
        build=args.build,
        device=args.device,
        dtype=args.dtype,
        quant=args.quant,
        threads=args.threads,
        max_tokens=args.max_tokens,
        ndev=args.ndev,
        dev_ids=None if args.dev_ids is None else _numbers(args.dev_ids, "--dev-ids"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m runtime.generate",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    prompt = parser.add_argument_group("prompt (one of --prompt and --tokens)")
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="the text to continue or, with --chat, to answer; - reads standard input"
    )
    prompt.add_argument("--tokens", metavar="1,2,3", help="token ids instead of text; the answer is printed as ids too")
    prompt.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    prompt.add_argument("--system", metavar="TEXT", help="system message (means --chat)")
    prompt.add_argument("--think", action="store_true", help="let the model think before it answers (means --chat)")
    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max-steps", type=int, default=50, metavar="N", help="at most so many new tokens (default: 50)"
    )
    answer.add_argument("--temperature", type=float, metavar="T", help="0: likeliest token; 1: as the model says")
    answer.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    answer.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that have P together"
    )
    answer.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    answer.add_argument("--stream", action="store_true", help="print the text as it is made")
    answer.add_argument(
        "--json", action="store_true", help="print one JSON object: text, tokens, finish_reason, speed, ..."
    )
    return parser


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}, expected numbers separated by commas") from None


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if (args.prompt is None) == (args.tokens is None):
        raise ConfigError("expected one of --prompt and --tokens, found " + ("none" if args.prompt is None else "both"))
    if args.stream and args.json:
        raise ConfigError("--stream and --json exclude each other")
    chat = args.chat or args.system is not None or args.think
    if args.tokens is not None and chat:
        raise ConfigError("--tokens: found --chat, --system or --think as well, which need --prompt")
    prompt: Any = args.prompt if args.tokens is None else _numbers(args.tokens, "--tokens")
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"prompt: standard input is not UTF-8 text ({error.reason})") from None
    sampling = args.temperature is not None or args.top_p is not None
    top_k = args.top_k if args.top_k is not None else _NO_LIMIT if sampling else 1
    from runtime.qwen3 import Qwen3ForCausalLM  # after the arguments are known to be good: it loads numpy and more

    with Qwen3ForCausalLM(**model_arguments(args)) as model:
        generation = model.stream(
            prompt,
            args.max_steps,
            1.0 if args.top_p is None else args.top_p,
            top_k,
            1.0 if args.temperature is None else args.temperature,
            args.seed,
            chat,
            args.think,
            args.system,
        )
        if args.stream:
            for piece in generation:
                print(piece, end="", flush=True)
            print()
            return 0
        text = "".join(generation)
        if not args.json:
            print(text if args.tokens is None else ",".join(map(str, generation.tokens)))
            return 0
        report = {
            "text": text,
            "tokens": generation.tokens,
            "prompt_tokens": generation.prompt_tokens,
            "finish_reason": generation.finish_reason,
            "seed": generation.seed,
            "load_s": round(model.load_seconds, 4),
            "first_token_ms": round(1000 * generation.seconds[0], 3),
            "ms_per_step": round(generation.ms_per_step, 3),
        }
        print(json.dumps(report, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
