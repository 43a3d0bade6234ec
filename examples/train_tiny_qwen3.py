"""Train the bundled tiny Qwen3 checkpoint: tokenizer, weights and configuration files, from nothing.

    pip install -e '.[train]'
    python examples/train_tiny_qwen3.py                      # 20 to 25 minutes on two idle CPU cores
    python examples/train_tiny_qwen3.py --evaluate           # only measure the checkpoint that is there

The checkpoint is written at the end, into --out, each file by renaming; one that answers more sums right is kept unless
--force is given. Everything random follows from --seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny_tasks as tasks
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_model import Config, Qwen3
from tiny_tokenizer import ENDOFTEXT, IM_END, VOCABULARY, answer_ids, chat_prompt, train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

# Every width differs from every other, so that a transposed or mistaken dimension cannot go unnoticed: 600 tokens in a
# vocabulary padded to 608 (Qwen3 pads too), 160 wide, 6 * 32 = 192 query and 2 * 32 = 64 key channels, 384 inner.
SHAPE: Config = {
    "vocab_size": 608,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
}
MAX_POSITIONS = 512
ROW = 128  # tokens per packed training row; the longest conversation fits
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a tiny model.", "Answer in one line.", "你是一个助手。")


def model_config(tokenizer: Tokenizer) -> Config:
    """The contents of config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": SHAPE["num_hidden_layers"],
        "model_type": "qwen3",
        "pad_token_id": tokenizer.token_to_id(ENDOFTEXT),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **SHAPE,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of generation_config.json: greedy, and like Qwen3 two ids that end an answer."""
    end, text_end = tokenizer.token_to_id(IM_END), tokenizer.token_to_id(ENDOFTEXT)
    return {"do_sample": False, "eos_token_id": [end, text_end], "pad_token_id": text_end}


# --------------------------------------------------------------------------------------------------------------- data

Sample = tuple[list[int], int]  # token ids, and how many at the front are given (not answers)


def draw_task(rng: random.Random) -> tasks.Task:
    kind = rng.choices(("addition", "reversal", "fixed", "fallback"), (56, 28, 12, 4))[0]
    if kind == "addition":
        return tasks.addition_training(rng)
    if kind == "reversal":
        return tasks.reversal_training(rng)
    return tasks.fixed_training(rng) if kind == "fixed" else tasks.fallback(rng)


def conversation(tokenizer: Tokenizer, task: tasks.Task, history: list[tasks.Task], system: str | None) -> Sample:
    """The exact tokens of a chat with thinking off, of which only the last answer counts."""
    messages = [{"role": "system", "content": system}] if system else []
    for earlier in history:
        messages += [{"role": "user", "content": earlier.prompt}, {"role": "assistant", "content": earlier.answer}]
    messages.append({"role": "user", "content": task.prompt})
    given = tokenizer.encode(chat_prompt(messages)).ids
    return given + answer_ids(tokenizer, task) + [tokenizer.token_to_id(IM_END)], len(given)


def draw_sample(rng: random.Random, tokenizer: Tokenizer) -> Sample:
    """One training sample: mostly a first question, some later turns, and a few sums as plain text without a chat."""
    while True:
        if rng.random() < 0.03:
            task = tasks.addition_training(rng)
            given = tokenizer.encode(task.prompt).ids
            return given + answer_ids(tokenizer, task) + [tokenizer.token_to_id(ENDOFTEXT)], len(given)
        history = [draw_task(rng) for _ in range(rng.choices((0, 1, 2, 3), (84, 9, 5, 2))[0])]
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None
        sample = conversation(tokenizer, draw_task(rng), history, system)
        if len(sample[0]) <= ROW:
            return sample


def pack(samples: list[Sample], rows: int, length: int) -> tuple[dict[str, Tensor], int]:
    """Lay samples side by side, first fit, into ``rows`` rows; they cannot see each other and positions start anew.

    Returns the model's arguments and the targets ("labels", one per wanted token), and how many samples fitted.
    """
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    owner = torch.zeros_like(ids)
    labels = torch.full_like(ids, -1)
    used = [0] * rows
    count = 0
    for tokens, given in samples:
        row = next((r for r in range(rows) if used[r] + len(tokens) <= length), None)
        if row is None:
            break
        count += 1
        place = slice(used[row], used[row] + len(tokens))
        row_tokens = torch.tensor(tokens)
        ids[row, place] = row_tokens
        positions[row, place] = torch.arange(len(tokens))
        owner[row, place] = count
        labels[row, place.start + given - 1 : place.stop - 1] = row_tokens[given:]
        used[row] += len(tokens)
    mask = (owner[:, :, None] == owner[:, None, :]).tril()[:, None]
    wanted = labels >= 0
    return dict(ids=ids, positions=positions, mask=mask, wanted=wanted, labels=labels[wanted]), count


def to_device(batch: dict[str, Tensor], device: str) -> tuple[dict[str, Tensor], Tensor]:
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return moved, moved.pop("labels")


# ----------------------------------------------------------------------------------------------------------- training


def train(model: Qwen3, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """AdamW, linear warm-up, cosine decay to zero; norms and embeddings without weight decay."""
    decayed = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
    free = [w for name, w in model.named_parameters() if w.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = random.Random(args.seed)
    if not args.no_compile:
        model.compile()
    started, seen, waiting = time.monotonic(), 0, []
    for step in range(1, args.steps + 1):
        while len(waiting) < args.rows * 8:
            waiting.append(draw_sample(rng, tokenizer))
        packed, count = pack(waiting, args.rows, ROW)
        del waiting[:count]
        seen += count
        batch, labels = to_device(packed, args.device)
        loss = F.cross_entropy(model(**batch), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == args.steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{args.steps}  loss {loss.item():.5f}  samples {seen}  {seconds:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model: Qwen3, samples: list[Sample], device: str) -> tuple[int, float]:
    """How many answers greedy decoding would get exactly right, and the smallest margin between a right token's logit
    and the best other one among the right answers.

    Greedy decoding gives the whole answer exactly when every token of it is the likeliest after the tokens before it,
    so one pass over prompt and answer decides, without generating.
    """
    right, margin = 0, math.inf
    for first in range(0, len(samples), 256):
        chunk = samples[first : first + 256]
        packed, count = pack(chunk, len(chunk), max(len(tokens) for tokens, _ in chunk))
        assert count == len(chunk)
        # First fit mixes the samples; the owner of each wanted token follows from where its row restarts.
        batch, labels = to_device(packed, device)
        logits = model(**batch).float()
        at_label = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        starts = (batch["positions"] == 0).flatten().cumsum(0).view_as(batch["positions"])[batch["wanted"]]
        gaps = torch.full((int(starts.max()) + 1,), math.inf, device=device)
        gaps = gaps.scatter_reduce(0, starts, at_label - others, "amin")
        gaps = gaps[gaps < math.inf]
        assert len(gaps) == len(chunk)
        right += int((gaps > 0).sum())
        margin = min(margin, float(gaps[gaps > 0].min())) if bool((gaps > 0).any()) else margin
    return right, margin


def evaluation_sets(tokenizer: Tokenizer, n: int) -> dict[str, list[Sample]]:
    """Held-out questions by kind; "second turn" puts a held-out sum after another conversation turn."""
    rng = random.Random("evaluation")
    sums = tasks.addition_heldout(n, seed=1)

    def alone(questions: list[tasks.Task]) -> list[Sample]:
        return [conversation(tokenizer, task, [], None) for task in questions]

    return {
        "addition": alone(sums),
        "carry chains": alone(tasks.carry_chains_heldout(min(n, 1000), seed=1)),
        "reversal": alone(tasks.reversal_heldout(min(n, 1000), seed=1)),
        "fixed": alone(tasks.fixed_answers()),
        "second turn": [conversation(tokenizer, task, [draw_task(rng)], None) for task in sums[:1000]],
    }


def evaluate(weights: dict[str, Tensor], config: Config, sets: dict[str, list[Sample]], device: str) -> dict[str, Any]:
    """Accuracy (0 to 1) and smallest margin by dtype of the arithmetic and kind of question, for bf16 weights."""
    report: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        model = Qwen3(config)
        model.load_state_dict(weights)
        model.to(device=device, dtype=dtype)
        for kind, samples in sets.items():
            right, margin = score(model, samples, device)
            entry = {"questions": len(samples), "right": right, "accuracy": right / len(samples)}
            report.setdefault(name, {})[kind] = {**entry, "smallest_margin": round(margin, 3) if right else None}
            print(f"{name:5} {kind:13} {right:6}/{len(samples):<6} {right / len(samples):8.3%}  margin {margin:.3f}")
    return report


# --------------------------------------------------------------------------------------------------------------- files


def write_checkpoint(out: Path, tokenizer: Tokenizer, config: Config, weights: dict[str, Tensor], report: Any) -> None:
    """Write every file beside ``out`` first, then rename them into it, the weights last."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": config,
        "generation_config.json": generation_config(tokenizer),
        "training_report.json": report,
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        staged = Path(name)
        write_tokenizer(tokenizer, staged, MAX_POSITIONS)
        for file, content in contents.items():
            (staged / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(staged.iterdir(), key=lambda path: path.name == "model.safetensors"):
            path.chmod(0o644)
            os.replace(path, out / path.name)


def earlier_accuracy(out: Path) -> float:
    """Share of sums (f32) that the checkpoint in ``out`` answers right, or -1 if there is none."""
    try:
        report = json.loads((out / "training_report.json").read_text(encoding="utf-8"))
        return float(report["accuracy"]["f32"]["addition"]["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    default = Path(__file__).resolve().parent / "tiny-qwen3"
    parser.add_argument("--out", type=Path, default=default, help="folder of the checkpoint (default: tiny-qwen3)")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=40, help=f"rows of {ROW} tokens per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="a PyTorch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile (no C++ compiler; 1.5x time)"
    )
    parser.add_argument("--eval-size", type=int, default=4000, help="held-out sums (default: %(default)s)")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in --out, train nothing")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that answers more sums right")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.evaluate:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        config = json.loads((args.out / "config.json").read_text(encoding="utf-8"))
        sets = evaluation_sets(tokenizer, args.eval_size)
        evaluate(load_file(args.out / "model.safetensors"), config, sets, args.device)
        return 0

    tokenizer = train_tokenizer()
    config = model_config(tokenizer)
    assert VOCABULARY <= config["vocab_size"]
    model = Qwen3(config).to(args.device)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters, {2 * parameters / 1e6:.2f} MB in bf16")
    started = time.monotonic()
    train(model, tokenizer, args)
    seconds = time.monotonic() - started
    weights = {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    accuracy = evaluate(weights, config, evaluation_sets(tokenizer, args.eval_size), args.device)
    before, now = earlier_accuracy(args.out), accuracy["f32"]["addition"]["accuracy"]
    if now < before and not args.force:
        print(f"{args.out}: the checkpoint there answers {before:.2%} of the sums, this one {now:.2%}: kept (--force)")
        return 1
    settings = {name: getattr(args, name) for name in ("steps", "rows", "lr", "seed", "device", "threads")}
    report = {
        "parameters": parameters,
        "settings": {**settings, "row_tokens": ROW, "torch": torch.__version__},
        "training_seconds": round(seconds),
        "accuracy": accuracy,
    }
    write_checkpoint(args.out, tokenizer, config, weights, report)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
