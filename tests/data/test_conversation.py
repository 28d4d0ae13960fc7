"""Conversational prompts: rendered by the tokenizer's chat template, and refused with reasons."""

import copy
import io
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from clp.data.conversation import is_conversation, message_text, prompt_text
from clp.data.json_lines import read_lines
from clp.data.paths import TINY
from clp.data.prompts import check_prompts, load_prompts
from clp.engine.requests import SamplingParams, parse_prompt
from clp.engine.sampler import Sampler
from clp.policies.policy import Policy
from clp.rewards import BUILTIN, sentiment
from clp.serving.jsonl import Defaults, sample_lines

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(TINY)
    assert made.chat_template is None
    made.chat_template = TEMPLATE
    return made


def test_the_template_renders_a_conversation(tokenizer):
    turns = [*HELLO, {"role": "assistant", "content": "Hi!"}, *HELLO]
    wanted = "<user>Hello.\n<assistant>Hi!\n<user>Hello.\n<assistant>"
    assert prompt_text(turns, tokenizer) == wanted
    assert prompt_text("Hello.", tokenizer) == "Hello."
    assert message_text(turns) == message_text("Hello.") == "Hello."
    assert is_conversation(turns) and is_conversation(tuple(turns))
    assert not any(map(is_conversation, ("Hello.", [], [1, 2], None)))


def test_the_sampler_takes_a_conversation(tokenizer):
    ids = parse_prompt(HELLO, tokenizer, len(tokenizer), "prompt")
    rendered = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=True)
    assert ids == rendered["input_ids"]  # the template writes no BOS token, so there is none
    with pytest.raises(ValueError, match="prompt 3: message 0 must be an object"):
        parse_prompt([{"role": "user"}], tokenizer, 9, "prompt 3")


def test_generate_takes_conversations(chat_model):
    sampler = Sampler(Policy.create(chat_model, ["joy"], r=1))
    params = SamplingParams(max_tokens=6, seed=1)
    chat, text = sampler.generate([HELLO, "Hello. Then"], [1.0], params)
    assert chat.token_ids == text.token_ids
    [line] = read_lines(io.BytesIO(b'{"prompt": [{"role": "user", "content": "Hello."}]}'))
    defaults, bar = Defaults(params, "joy=1", True), tqdm(disable=True)
    [group] = sample_lines(sampler, iter([line]), defaults, 0, bar)
    assert group.records[0]["token_ids"] == text.token_ids
    assert group.records[0]["prompt"] == HELLO


def test_refused_conversations(tokenizer):
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match=r"row 7 is a conversation, .* has no chat template"):
        prompt_text(HELLO, bare, "row 7")
    with pytest.raises(ValueError, match=r"row 7: .* refuses it: no system role"):
        prompt_text([{"role": "system", "content": "x"}], tokenizer, "row 7")


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", '{{ "a" + 1 }}', '{{ "{}".format() }}', "{{ range(10**9) }}", "{% if"],
)
def test_a_template_that_fails_refuses_its_conversation(tokenizer, template):
    broken = copy.copy(tokenizer)
    broken.chat_template = template
    with pytest.raises(ValueError, match="row 7: the tokenizer's chat template refuses it"):
        prompt_text(HELLO, broken, "row 7")


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "x"}, "y"],
    ],
)
def test_bad_messages_name_the_row(prompt):
    with pytest.raises(ValueError, match=r'train_dataset\[1\]: "prompt": message \d must be'):
        check_prompts([{"prompt": HELLO}, {"prompt": prompt}])


def test_texts_and_conversations_do_not_mix():
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: .* a conversation as in the first"):
        check_prompts([{"prompt": HELLO}, {"prompt": "Hello."}])
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: .* a conversation as in the first"):
        check_prompts([{"prompt": "Hello."}, {"prompt": HELLO}])


def test_files_hold_conversations(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "Hello."}], "n": 1}\n')
    assert load_prompts(path) == [{"prompt": HELLO, "n": 1}]


def test_built_in_rewards_measure_the_last_message():
    texts = ["What a lovely day it was!", "Bad bad."]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"reference": ["a lovely day", ["good", "bad"]]}
    for function in BUILTIN.values():
        assert function([HELLO, HELLO], messages, **columns) == function(["", ""], texts, **columns)
    assert sentiment([HELLO], messages[:1])[0] > 0.5
