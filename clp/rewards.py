"""The built-in reward functions; clp/data/scoring.py has the signature of any reward.

Every reward of this file is deterministic, in [0, 1] and larger when better, so the hypervolume's
reference point can be the origin. Prompts and completions are texts, or conversations: of a
completion the last message is measured. The text measures are made for English: text in another
script has no words.
"""

import difflib
import functools
import itertools
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rapidfuzz.distance import LCSseq

from clp.data.conversation import Messages, is_conversation, message_text
from clp.data.paths import classifier_source, home_expanded
from clp.data.prompts import ARGUMENTS
from clp.data.scoring import RewardFunc

Texts = Sequence[str | Messages]

_SPEC = re.compile(r"(?:([^=:]*)=)?(.*)", re.DOTALL)
_OBJECTIVE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# "cake", "whale", "walked" and "likes", but neither "table", "settled", "wanted" nor "wishes".
_SILENT_E = re.compile("(?:[aeiouyl]l|[^aeiouyl])(?:e|(?<![dt])ed|(?<![cghsxz])es)$")


def words(text: str) -> list[str]:
    """The words of `text`, in order and as written: maximal runs of `[A-Za-z0-9']`."""
    return re.findall(r"[A-Za-z0-9']+", text)


def distinct_2(texts: Sequence[str]) -> float:
    """Unique word bigrams / all word bigrams, lower-cased, pooled over `texts`. In [0, 1].

    No bigram crosses two texts; without a bigram 0. It falls as more text is pooled: compare sets
    of equal size only. Source: Li et al. 2016 (arXiv:1510.03055), who divide by tokens instead.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of strings, got the string {reprlib.repr(texts)}")
    bigrams = [pair for text in texts for pair in itertools.pairwise(words(text.lower()))]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


@functools.cache
def _analyser():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: Texts, completions: Texts, **columns) -> list[float]:
    """`(1 + compound) / 2`, VADER's compound score of the completion. In [0, 1].

    0.5 is neutral, and what an empty completion gives. Source: Hutto and Gilbert 2014, by the
    package vaderSentiment.
    """
    texts = map(message_text, completions)
    return [(1 + _analyser().polarity_scores(text)["compound"]) / 2 for text in texts]


def brevity(prompts: Texts, completions: Texts, **columns) -> list[float]:
    """`exp(-n / 20)` for a completion of n > 0 words, 0 for n = 0. In [0, 1).

    Each word costs 4.9 % of the rest: 0.951 at 1 word, 0.050 at 60, where one word still changes it
    by 0.0026; a clipped line would be constant past its end. A completion without a word gets 0: if
    it got 1, an empty completion would be the optimum for every prompt.
    """
    counts = [len(words(message_text(text))) for text in completions]
    return [math.exp(-count / 20) if count else 0.0 for count in counts]


def syllables(word: str) -> int:
    """The syllables of an English word, by the rule that `readability` states."""
    letters = word.lower().replace("'", "")
    return max(1, len(re.findall("[aeiouy]+", letters)) - bool(_SILENT_E.search(letters)))


def _reading_ease(text: str) -> float:
    tokens = words(text)
    sentences = max(1, sum(len(words(part)) >= 3 for part in re.split("[.!?]+", text)))
    spoken, count = sum(map(syllables, tokens)), max(1, len(tokens))
    ease = 206.835 - 1.015 * count / sentences - 84.6 * spoken / count
    return min(1.0, len(set(map(str.lower, tokens))) / 10) * min(1.0, max(0.0, ease / 100))


def readability(prompts: Texts, completions: Texts, **columns) -> list[float]:
    """Flesch reading ease of the completion, as a share of 100, guarded. In [0, 1].

        ease  = 206.835 - 1.015 * words / sentences - 84.6 * syllables / words
        value = min(1, different words / 10) * clip(ease / 100, 0, 1)

    Syllables by rule, without a dictionary: groups of adjacent vowels (aeiouy), less one for
    a final "e", "ed" (not after d, t) or "es" (not after c, g, h, s, x, z) after a consonant (but
    not after consonant + "l"), at least one per word. Two guards, as the formula was fitted to
    passages of 100 words and any few short words exceed 100: a part of fewer than 3 words ends no
    sentence (a text has at least one), so "Wow! Wow! Wow! ..." is one growing sentence; below 10
    different words the value shrinks in proportion, so repeating a phrase cannot win. No word
    gives 0. Source: Flesch 1948, A new readability yardstick.
    """
    return [_reading_ease(message_text(text)) for text in completions]


def diversity(prompts: Texts, completions: Texts, **columns) -> list[float]:
    """`distinct_2` of each completion by itself. In [0, 1]; 0 for fewer than two words."""
    return [distinct_2([message_text(text)]) for text in completions]


def _rouge_l(text: str, reference: str) -> float:
    # An apostrophe separates here: the tokens of the package rouge-score without its stemmer.
    a, b = (" ".join(words(one.lower())).replace("'", " ").split() for one in (text, reference))
    return 2 * LCSseq.similarity(a, b) / max(1, len(a) + len(b))


def rouge(prompts: Texts, completions: Texts, **columns) -> list[float | None]:
    """ROUGE-L F1 against the column `reference`: a string, or a list of which the best counts.

        F1 = 2 * LCS(a, b) / (len(a) + len(b)), on lower-cased alphanumeric tokens, unstemmed

    In [0, 1]; without a token 0; None where the reference is None. ValueError if the column is
    missing or has another length, TypeError for a reference of another kind. Source: Lin 2004; the
    LCS by rapidfuzz.
    """
    references = columns.get("reference")
    if references is None:
        came = ", ".join(repr(name) for name in columns if name not in ARGUMENTS) or "none"
        raise ValueError(f"rouge needs the column 'reference'; columns that came: {came}")
    scores: list[float | None] = []
    for row, (text, given) in enumerate(zip(completions, references, strict=True)):
        if given is None:
            scores.append(None)
            continue
        options = [given] if isinstance(given, str) else given
        listed = isinstance(options, list | tuple) and len(options) > 0
        if not listed or not all(isinstance(option, str) for option in options):
            expected = f"a string or a list of strings, got {reprlib.repr(given)}"
            raise TypeError(f"column 'reference', row {row}: expected {expected}")
        scores.append(max(_rouge_l(message_text(text), option) for option in options))
    return scores


def classifier(
    path: str | Path, label: str | int | None = None, *, device: str | torch.device = "cpu"
) -> RewardFunc:
    """A reward function from a folder with a transformers sequence classifier. In [0, 1].

    The score is the softmax probability of `label` (a name, else an index; default the last) for
    `prompt + completion`, or the sigmoid of its logit if the model has one output or is of type
    multi_label_classification. A conversation becomes a text by the classifier's own chat template,
    or without one as its messages' contents, joined by newlines. A text beyond the model's length
    loses its beginning.
    Nothing is downloaded, no code of the folder runs, no pickle is read; float32, eval mode. Texts
    are deduplicated and batched in a fixed order: permuted examples give permuted scores, bit for
    bit. ValueError if the folder is not a complete sequence classifier or lacks the label.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from clp.policies.loading import loading

    folder = home_expanded(path)
    wrong = f"{str(folder)!r} is not a folder with a sequence classifier"
    problem = f"{wrong}: "
    if not (folder / "config.json").is_file():
        raise ValueError(f"{problem}it has no config.json")
    if (folder / "adapter_config.json").exists():  # its load report would hide the base model's
        raise ValueError(f"{problem}it has an adapter_config.json; merge the adapter first")
    local = {"local_files_only": True, "trust_remote_code": False}
    with loading(wrong):
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left", **local)
        # A "_attn_implementation" in config.json may name a kernel to download, and wins over the
        # argument unless the config comes as an object (transformers 5.23).
        config = AutoConfig.from_pretrained(folder, **local)
        options = {"config": config, "attn_implementation": "eager", "dtype": torch.float32} | local
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    # transformers only warns of a random head, and makes an empty tokenizer for a missing one.
    if report["missing_keys"]:
        raise ValueError(f"{problem}its weights lack {sorted(report['missing_keys'])[:4]}")
    rows = model.get_input_embeddings().weight.shape[0]
    if not len(set(tokenizer.all_special_ids)) < len(tokenizer) <= rows:
        raise ValueError(f"{problem}{len(tokenizer)} tokens in its tokenizer, {rows} in its model")
    names = {name: index for index, name in config.id2label.items()}
    if label is None:
        index = config.num_labels - 1
    else:
        index = names.get(label, int(label) if re.fullmatch("[0-9]{1,9}", str(label)) else -1)
    if not 0 <= index < config.num_labels:
        raise ValueError(f"classifier {str(folder)!r} has no label {label!r}; it has {names}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions - 2  # RoBERTa's positions start at 2
    padding = tokenizer.pad_token_id is not None and tokenizer.pad_token_id == config.pad_token_id
    step = 32 if padding else 1
    single = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    model.to(device).eval()

    @torch.no_grad()
    def reward(prompts: Texts, completions: Texts, **columns) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        texts = [_whole_text(prompt, completion, tokenizer) for prompt, completion in pairs]
        # A chat template writes special tokens itself.
        special = tokenizer.chat_template is None or not any(map(is_conversation, prompts))
        order = sorted(set(texts), key=lambda text: (len(text), text))
        found: dict[str, float] = {}
        for batch in (order[start : start + step] for start in range(0, len(order), step)):
            inputs = tokenizer(
                batch, padding=padding, truncation=True, return_tensors="pt",
                add_special_tokens=special,
            )  # fmt: skip
            logits = model(**inputs.to(device)).logits
            values = logits.sigmoid() if single else logits.softmax(-1)
            found.update(zip(batch, values[:, index].tolist(), strict=True))
        return [found[text] for text in texts]

    return reward


def _whole_text(prompt: str | Messages, completion: str | Messages, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt + message_text(completion)
    whole = [*prompt, {"role": "assistant", "content": message_text(completion)}]
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in whole)
    return str(tokenizer.apply_chat_template(whole, tokenize=False))


BUILTIN: dict[str, RewardFunc] = {
    func.__name__: func for func in (sentiment, brevity, readability, diversity, rouge)
}


def load_rewards(specs: Sequence[str]) -> dict[str, RewardFunc]:
    """Objective name -> reward function, in the order of `specs`.

    A spec is `[objective=]builtin` or `objective=classifier:PATH[#label]` (see clp.data.paths);
    without `objective=` the name is the built-in's. Names become folders: `[A-Za-z_][A-Za-z0-9_]*`,
    at most 64 long, distinct even in lower case. ValueError names the faulty spec, and comes
    before any classifier is loaded.
    """
    if isinstance(specs, str) or not all(isinstance(spec, str) for spec in specs):
        raise TypeError(f"rewards must be a list of strings, got {reprlib.repr(specs)}")
    known = [*BUILTIN, "classifier"]
    if not specs:
        raise ValueError(f"rewards is empty: give at least one of {', '.join(known)}")
    plan: dict[str, Callable[[], RewardFunc]] = {}
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        assert match is not None  # every string matches
        objective, reward = match.groups()
        kind, _, target = reward.partition(":")
        if kind == "classifier":
            source = [part for part in classifier_source(target) if part is not None]
            if objective is None or not all(source):
                raise ValueError(f"reward {spec!r}: write objective=classifier:PATH[#label]")
            load = functools.partial(classifier, *source)
        elif reward in BUILTIN:
            load = functools.partial(BUILTIN.get, reward)
        else:
            close = difflib.get_close_matches(kind.lower(), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "your own go to CLPTrainer in Python"
            raise ValueError(f"reward {spec!r} is none of {', '.join(known)}; {hint}")
        name = reward if objective is None else objective
        if not _OBJECTIVE.fullmatch(name):
            raise ValueError(f"reward {spec!r}: {name!r} must match {_OBJECTIVE.pattern}")
        if name.lower() in map(str.lower, plan):
            raise ValueError(f"reward {spec!r}: there is already an objective {name!r}")
        plan[name] = load
    return {name: load() for name, load in plan.items()}
