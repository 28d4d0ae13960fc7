"""Prompts as token ids, and the text of completions: special tokens, stop strings."""

import copy
import itertools
import random
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clp.data.conversation import encode
from clp.engine.detokenizer import Text, completion_text, special_texts
from clp.engine.requests import parse_prompt
from clp.policies.loading import load_base

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
BOS, EOS = 1, 2


@cache
def tokenizer(template=None, metaspace=False, extra=()):
    """Characters as tokens; `template` is what the tokenizer makes of every text ("$A")."""
    letters = "abcdefghijklmnopqrstuvwxyz<>/|.\u2581 "
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters, "ab", "bcd", "cd"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("a", "b"), ("c", "d"), ("b", "cd")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if metaspace:  # as Llama's: a space in front, and none of it in the text
        marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        made.normalizer = normalizers.Sequence(marks)
        spaces = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(spaces)
    else:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        made.decoder = decoders.Fuse()
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        made.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    whole = PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
    if extra:
        whole.add_special_tokens({"additional_special_tokens": list(extra)})
    return whole


def plain(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


TEMPLATES = [None, "<s> $A", "$A </s>", "<s> $A </s>"]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "text", ["once upon", "<s>once", "<s>", "<s><s>a", "a</s>", "</s>", "a<s>b</s>"]
)
def test_one_bos_in_front_and_no_eos_behind_but_the_texts_own(template, text, metaspace):
    tok = tokenizer(template, metaspace)
    own = plain(tok, text)
    wanted = own if template in TEMPLATES[::2] or own[0] == BOS else [BOS, *own]
    assert encode(tok, text) == wanted == parse_prompt(text, tok, len(tok), "prompt")


def test_the_embedded_models_tokenizer():
    tok = load_base("tiny")[1]
    assert encode(tok, "Once") == tok("Once")["input_ids"]
    assert encode(tok, tok.bos_token + "Once") == tok("Once")["input_ids"]


@pytest.mark.parametrize(
    ("template", "wanted"), list(zip(TEMPLATES, [[], [BOS], [], [BOS]], strict=True))
)
def test_an_empty_text_is_what_stands_in_front_of_every_text(template, wanted):
    assert encode(tokenizer(template), "") == wanted


@pytest.mark.parametrize("text", ["ab", "", "ab</s>", "</s>", "a<s><|x|>"])
def test_two_tokens_in_front_and_two_behind(text):
    """As GLM's "[gMASK]<sop>" in front, and mBART's end and language behind."""
    tok = copy.deepcopy(tokenizer(extra=("<|x|>",)))
    tag = tok.convert_tokens_to_ids("<|x|>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> <|x|> $A </s> <|x|>", special_tokens=[("<s>", BOS), ("</s>", EOS), ("<|x|>", tag)]
    )
    wanted = [BOS, tag, *plain(tok, text)]
    assert encode(tok, text) == wanted
    assert encode(tok, "<s><|x|>" + text) == wanted
    assert encode(tok, "<s>" + text) == wanted  # the BOS token alone: it gets no other


def test_a_tokenizer_whose_bos_is_its_eos():
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer("$A </s>").backend_tokenizer.to_str()),
        bos_token="</s>", eos_token="</s>",
    )  # fmt: skip
    assert encode(tok, "a</s>") == plain(tok, "a</s>")
    assert encode(tok, "</s>") == [EOS]


def test_a_chat_template_that_writes_the_bos_token():
    tok = tokenizer("<s> $A </s>", extra=("<|x|>",))
    tok.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|x|>{% endif %}"
    )
    ids = parse_prompt([{"role": "user", "content": "ab"}], tok, len(tok), "prompt")
    assert tok.convert_ids_to_tokens(ids) == ["<s>", "ab", "</s>", "<|x|>"]


def test_a_conversation_has_the_special_tokens_of_its_template_alone():
    tok = tokenizer("<s> $A </s>")
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "ab"}]
    ids = parse_prompt(messages, tok, len(tok), "prompt")
    assert ids == tok.apply_chat_template(messages, tokenize=True)["input_ids"] == plain(tok, "ab")


def test_ids_are_taken_as_they_are():
    assert parse_prompt([BOS, BOS, 5, EOS], tokenizer("<s> $A </s>"), 40, "prompt") == [1, 1, 5, 2]


# Stop strings


def feed(tok, ids, stop, prompt=()):
    """The text at the end, and what a stream tells; both must agree."""
    text = Text(tok, list(prompt), stop, special_texts(tok))
    told = ""
    for i, token in enumerate(ids):
        stopped = text.add(token)
        last = stopped or i == len(ids) - 1
        if last:
            text.finish()
        told += text.take(last)
        if stopped:
            break
    assert told == text.text
    return text.text, i + 1 if text.stopped else None


CASES = {
    # (text drawn, stop strings): text, and after which token it stops
    "a special token": ("ab</s>c", ["</s>"], "ab", 2),
    "not a special token that is spelt": ("a b", ["</s>"], "a b", None),
    "a special token and what follows": ("ab</s>cz", ["</s>c"], "ab", 3),
    "what stands before a special token": ("zc<|x|>a", ["c<|x|>"], "z", 3),
    "between two special tokens": ("z<|x|>c</s>a", ["<|x|>c</s>"], "z", 4),
    "two special tokens": ("z<|x|></s>a", ["<|x|></s>"], "z", 3),
    "the same special token before": ("z</s>y</s>c", ["</s>c"], "zy", 5),
    "an end of a special token's text": ("z<|x|>c", ["|>c"], "z", 3),
    "a beginning that does not go on": ("zc<|x|>yd", ["c<|x|>d"], "zcyd", None),
    "the earliest complete": ("bcd", ["bcd", "c"], "b", 1),
    "in the middle of one token": ("bcdz", ["bcdz", "d"], "bc", 1),
    "list order where both are complete": ("bcd", ["cd", "bcd"], "b", 1),
    "list order, turned": ("bcd", ["bcd", "cd"], "", 1),
    "across tokens": ("xyz", ["wz", "yz"], "x", 3),
    "a longer beginning is overtaken": ("xyzw", ["xyzq", "yzw"], "x", 4),
    "none": ("xyz", [], "xyz", None),
}  # fmt: skip


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_stop_strings(name, metaspace):
    drawn, stop, wanted, at = CASES[name]
    tok = tokenizer(metaspace=metaspace, extra=("<|x|>",))
    prompt = plain(tok, "qq")
    ids = plain(tokenizer(extra=("<|x|>",)), drawn)
    assert feed(tok, ids, stop, prompt) == (wanted, at)


def of_bytes(kind):
    """A tokenizer of bytes: as GPT-2 writes them, or as Llama falls back to them."""
    if kind == "byte level":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokens = ["<pad>", "<s>", "</s>", *sorted(alphabet)]
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        tokens = ["<pad>", "<s>", "</s>", "<unk>", *"abceq", *(f"<0x{i:02X}>" for i in range(256))]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize(
    ("drawn", "stop", "wanted", "at"),
    [
        ("a\U0001f642b", ["\U0001f642"], "a", 5),
        ("a\U0001f642b", ["\U0001f642b", "a\u00e9"], "a", 6),
        ("\u00e9\u4e2d", ["\u4e2d", "\u00e9\u4e2d"], "\u00e9", 5),
        ("a\u00e9</s>b\u00e9", ["\u00e9</s>b\u00e9"], "a", 7),
        ("\u4e2d</s>\u4e2d", ["</s>\u4e2d"], "\u4e2d", 7),
        ("e\u0301a", ["\u0301"], "e", 3),
        ("\U0001f642\U0001f641", ["\U0001f643"], "\U0001f642\U0001f641", None),
    ],
)
def test_stop_strings_of_characters_that_are_several_tokens(kind, drawn, stop, wanted, at):
    tok = of_bytes(kind)
    assert feed(tok, plain(tok, drawn), stop, plain(tok, "q")) == (wanted, at)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_stop_strings_after_half_a_character(kind):
    """What is left of it is a replacement character, and a stop string that follows is seen."""
    tok = of_bytes(kind)
    (first, _), (a, b), end = plain(tok, "\u00e9"), plain(tok, "ab"), [EOS]
    assert feed(tok, [a, first, b, a], ["b"], [b]) == ("a\ufffd", 3)
    assert feed(tok, [a, first, *end, a], ["</s>"], [b])[1] == 3


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("before", ["q", "\u4e2d", "\u4e2d\u4e2d\u4e2d\u4e2d"])
@pytest.mark.parametrize("character", ["\u00e9", "\u4e2d", "\U0001f642"])
def test_many_characters_that_are_several_tokens(kind, before, character):
    """A row of emoji, or a script that the vocabulary lacks."""
    tok = of_bytes(kind)
    ids, prompt, whole = plain(tok, 7 * character + "c"), plain(tok, before), 7 * character
    assert feed(tok, ids, ["c"], prompt) == (whole, len(ids))
    assert feed(tok, ids[:-1], [], prompt) == (whole, None)
    assert completion_text(tok, prompt, ids) == whole + "c"


def test_the_issues_own_case():
    tok = tokenizer()
    assert feed(tok, [tok.convert_tokens_to_ids("bcd")], ["bcd", "c"])[0] == "b"
    text = Text(tok, [], ["abc", "b"])
    text.decode = lambda ids: "abc" * len(ids)  # one token
    assert text.add(5) and text.text == "a"


@pytest.mark.parametrize("seed", range(20))
def test_any_stops_are_those_of_the_written_text(seed):
    """Against the definition: the whole text written out, cut at the earliest complete stop."""
    rng, tok = random.Random(seed), tokenizer(extra=("<|x|>",))
    special = special_texts(tok)
    ids = [i for i in range(len(tok)) if i != 3]
    shown = {i: special.get(i) or tok.decode([i]) for i in ids}
    for _ in range(60):
        drawn = rng.choices(ids[1:3] + ids[-1:] + ids[4:8] + ids[-5:], k=12)
        written = "".join(shown[i] for i in drawn)
        stop = []
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(written))
            stop.append(written[at : at + rng.randint(1, 7)] + rng.choice(["", "", "a"]))
        found = [(written.find(s) + len(s), k) for k, s in enumerate(stop) if s in written]
        text, after = feed(tok, drawn, stop)
        if not found:
            assert (text, after) == (completion_text(tok, [], drawn), None)
            continue
        # The token in which the first is complete, and of what is complete in it the earliest.
        end, k = min(found)
        ends = list(itertools.accumulate(len(shown[i]) for i in drawn))
        assert after == next(n for n, e in enumerate(ends, 1) if e >= end)
        start, visible = end - len(stop[k]), ""
        for i, e in zip(drawn, ends, strict=True):
            if i not in special:
                visible += shown[i][: max(0, start - (e - len(shown[i])))]
        assert text == visible
