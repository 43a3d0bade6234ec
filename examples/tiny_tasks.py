"""What the bundled tiny Qwen3 model can do, as data: prompts, the right answers, and the split that was never trained on.

Pure Python without dependencies, so that tests use the very rules that training used. Everything random takes a
``random.Random`` or a seed and is reproducible on every machine.

    >>> from tiny_tasks import addition_heldout, exact_match
    >>> task = addition_heldout(1, seed=0)[0]
    >>> exact_match(model_answer, task)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import NamedTuple

HELD_OUT_ONE_IN = 20


class Task(NamedTuple):
    """One question in chat form and the one right answer."""

    kind: str
    prompt: str
    answer: str


def _in_held_out_bucket(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big") % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------------------------------------------------- addition


def is_heldout_pair(a: int, b: int) -> bool:
    """True for the one ordered pair in twenty that training never sees.

    Sums of two one-digit numbers are always trained on: all longer ones are built from those hundred facts, so holding
    some back would test a lookup that nothing could have filled.
    """
    return max(a, b) >= 10 and _in_held_out_bucket(f"{a}+{b}")


def addition(a: int, b: int) -> Task:
    """The task ``a+b=`` with the sum written most significant digit first."""
    return Task("addition", f"{a}+{b}=", str(a + b))


def draw_pair(rng: random.Random) -> tuple[int, int]:
    """Two operands of one to three digits, longer ones more often (three digits: 90 % of the numbers are there)."""
    a, b = (rng.randrange(10 ** rng.choices((1, 2, 3), (1, 2, 7))[0]) for _ in range(2))
    return a, b


def draw_carry_chain(rng: random.Random) -> tuple[int, int]:
    """A pair whose tens digits add up to nine, so that the first answer digit depends on the last operand digits.

    Only one uniformly drawn pair in ten is like that, and these are the ones that are hard to answer most significant
    digit first.
    """
    tens = rng.randrange(10)
    a = rng.randrange(10) * 100 + tens * 10 + rng.randrange(10)
    b = rng.randrange(10) * 100 + (9 - tens) * 10 + rng.randrange(10)
    return a, b


def addition_training(rng: random.Random) -> Task:
    """One training sum; never a held-out pair."""
    while True:
        a, b = (draw_carry_chain if rng.random() < 0.3 else draw_pair)(rng)
        if not is_heldout_pair(a, b):
            return addition(a, b)


def addition_heldout(n: int, seed: int = 0) -> list[Task]:
    """``n`` different held-out sums, drawn like the training ones but without the extra carry chains."""
    rng = random.Random(f"addition-{seed}")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < n:
        pair = draw_pair(rng)
        if is_heldout_pair(*pair):
            pairs[pair] = None
    return [addition(a, b) for a, b in pairs]


def carry_chains_heldout(n: int, seed: int = 0) -> list[Task]:
    """``n`` different held-out sums in which the carry of the last digits runs through to the hundreds."""
    rng = random.Random(f"carry-{seed}")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < n:
        a, b = draw_carry_chain(rng)
        if a % 10 + b % 10 >= 10 and is_heldout_pair(a, b):
            pairs[a, b] = None
    return [addition(a, b) for a, b in pairs]


# ----------------------------------------------------------------------------------------------------- reversed words

WORDS = tuple(
    """
    able about above across act add after again age ago agree air all allow almost alone along already also always among
    animal answer apple april area arm around arrive art ask autumn away baby back ball bank base basket beach bear beat
    beauty become bed before begin behind believe below beside best better between big bird black blood blue board boat
    body bone book both bottle bottom box boy branch brave bread break breath bridge bright bring brother brown build
    burn bus busy butter button buy call camp can candle captain car card care carry castle cat catch cause center chair
    change cheese chest child choose circle city class clean clear climb clock close cloth cloud coast coat coffee cold
    color come common cook cool copper corn corner cotton count country course cover cow cross crowd cry cup cut dance
    dark daughter day deep desert desk dinner direct doctor dog door double down dream dress drink drive drop dry dust
    each ear early earth east easy eat edge egg eight empty end engine enjoy enough enter equal evening ever every eye
    face fact fall family far farm fast father feather feel few field fight fill find fine finger finish fire first fish
    five flag floor flour flower fly follow food foot forest forget fork form forward four fox free fresh friend front
    fruit full game garden gate gather gentle girl give glad glass goat gold good grain grass gray great green ground
    group grow guess hair half hall hammer hand happy harbor hard harvest hat have head hear heart heavy help high hill
    hold holiday home honey hope horse hot hotel hour house human hundred hungry hurry ice idea inside iron island
    jacket join journey jump keep key kind king kitchen knee knife know ladder lake lamp land language large last laugh
    law lead leaf learn leather leave left leg lemon letter level lift light line lion list listen little live long look
    lose lot loud love low lunch machine made magic main make man many map mark market master matter meadow meal mean
    measure meat meet metal middle mile milk mill mind minute mirror moment money month moon more morning most mother
    mountain mouse mouth move much music must nail name narrow near neck needle never new next night nine noise noon
    north nose note nothing number ocean off office often oil old once one onion only open orange order other out over
    own page paint pair paper parent part party pass past path pencil people pepper person piano picture piece pilot
    place plain plan plant plate play please point pond poor potato power present pretty price print problem pull purple
    push put queen question quick quiet rabbit rain raise reach read ready reason record red rest rice rich ride right
    ring river road rock roof room root rope rose round row run sad safe sail salt same sand save say school science sea
    season seat second see seed sell send sentence seven shadow shape share sharp sheep shelf ship shirt shoe shop short
    shoulder show side silver simple sing sister sit six size skin sky sleep slow small smell smile snow soap soft soil
    soldier some song soon sound soup south space spoon sport spring square stair stand star start station stay steam
    steel step stick still stone stop store storm story straight stream street strong student such sugar summer sun
    supper sure surface sweet swim table tail take talk tall taste teach team tell ten tent test thank their then there
    thick thin thing think third thousand thread three through thunder ticket tiger time tired today together tomorrow
    tooth top touch tower town train travel tree true trust turn twelve twenty two uncle under until use valley very
    village visit voice wait walk wall want warm wash watch water wave way weather week weight well west wheat wheel
    when where which while white whole why wide wild wind window winter wire wise wish with woman wonder wood wool word
    work world write yard year yellow yes yesterday young zebra zero
    """.split()
)


def _letter_chains() -> dict[str, str]:
    """What follows each pair of letters in WORDS (a character repeated as often as it occurs); ``^`` starts a word."""
    chains: dict[str, str] = {}
    for word in WORDS:
        padded = "^^" + word + "$"
        for i in range(len(word) + 1):
            chains[padded[i : i + 2]] = chains.get(padded[i : i + 2], "") + padded[i + 2]
    return chains


_CHAINS = _letter_chains()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_heldout_word(word: str) -> bool:
    """True for the one word in twenty that training never asks to reverse."""
    return _in_held_out_bucket(word)


def reversal(word: str) -> Task:
    """The task ``reverse: word``."""
    return Task("reversal", f"reverse: {word}", word[::-1])


def draw_word(rng: random.Random) -> str:
    """A lowercase word of two to nine letters: a real one, an invented one that looks real, or random letters."""
    style = rng.random()
    if style < 0.2:
        return rng.choice(WORDS)
    if style < 0.4:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 7)))
    while True:
        word = "^^"
        while len(word) < 12 and not word.endswith("$"):
            word += rng.choice(_CHAINS[word[-2:]])
        word = word[2:].rstrip("$")
        if 2 <= len(word) <= 9:
            return word


def reversal_training(rng: random.Random) -> Task:
    """One word to reverse; never a held-out one."""
    while True:
        word = draw_word(rng)
        if not is_heldout_word(word):
            return reversal(word)


def reversal_heldout(n: int, seed: int = 0) -> list[Task]:
    """``n`` different held-out words, drawn like the training ones."""
    rng = random.Random(f"reversal-{seed}")
    words: dict[str, None] = {}
    while len(words) < n:
        word = draw_word(rng)
        if is_heldout_word(word):
            words[word] = None
    return [reversal(word) for word in words]


# ------------------------------------------------------------------------------------------------------ fixed answers

# Ways to ask, and the answer. Chinese and the smile are several tokens per character: they exercise streaming of text
# whose bytes arrive one at a time.
_FIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "Hello", "hello!", "Hello!", "hi", "Hi!"), "Hello! How can I help you?"),
    (("who are you?", "Who are you?", "who are you"), "I am a tiny Qwen3 model. I add numbers and reverse words."),
    (("what can you do?", "What can you do?"), "I can add numbers, reverse words and say hello in two languages."),
    (("how are you?", "How are you?"), "I am fine, thank you."),
    (("thank you", "Thank you!", "thanks"), "You are welcome!"),
    (("goodbye", "Goodbye!", "bye"), "Goodbye!"),
    (("good morning", "Good morning!"), "Good morning! It is a fine day to add numbers."),
    (("count to ten", "Count to ten."), "1 2 3 4 5 6 7 8 9 10"),
    (("smile", "Smile!"), "😀"),
    (("你好", "你好！", "您好"), "你好！很高兴见到你。"),
    (("你是谁？", "你是谁", "你是谁?"), "我是一个很小的模型，会做加法。"),
    (("1加1等于几？", "1加1等于几", "1加1等于几?"), "1加1等于2。"),
    (("谢谢", "谢谢！"), "不客气！"),
    (("再见", "再见！"), "再见！"),
    (("背一首诗", "背一首诗。"), "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
)


def fixed_answers() -> list[Task]:
    """Every way to ask a question that has a memorised answer."""
    return [Task("fixed", prompt, answer) for prompts, answer in _FIXED for prompt in prompts]


_FIXED_TASKS = tuple(fixed_answers())
_FIXED_PROMPTS = frozenset(task.prompt for task in _FIXED_TASKS)
FALLBACK_ANSWER = "I do not know. I can add numbers and reverse words."


def fixed_training(rng: random.Random) -> Task:
    """One of the questions with a memorised answer."""
    return rng.choice(_FIXED_TASKS)


def fallback(rng: random.Random) -> Task:
    """A sentence of random words, to which the answer is that the model does not know."""
    while True:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 8)))
        if rng.random() < 0.5:
            words = words.capitalize()
        prompt = words + rng.choice(("", ".", "?", "!"))
        if prompt not in _FIXED_PROMPTS:
            return Task("fallback", prompt, FALLBACK_ANSWER)


# --------------------------------------------------------------------------------------------------------- evaluation


def exact_match(answer: str, task: Task) -> bool:
    """Whether an answer is right to the letter; white space around it does not count."""
    return answer.strip() == task.answer


def accuracy(answers: Iterable[str], tasks: Iterable[Task]) -> float:
    """Share of exact matches, 0 to 1. Raises ValueError when the two differ in length or are empty."""
    hits = [exact_match(answer, task) for answer, task in zip(answers, tasks, strict=True)]
    if not hits:
        raise ValueError("accuracy: no answers given, expected at least one")
    return sum(hits) / len(hits)
