import json
import math
import random
import shutil
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clp import rewards
from clp.rewards import (
    BUILTIN,
    brevity,
    classifier,
    distinct_2,
    diversity,
    load_rewards,
    readability,
    rouge,
    sentiment,
    words,
)

SAMPLE_WORDS = ["Wow!", "the", "cat's", "good", "not", "but", "BAD", "walked", "idea?", "e.g.", "'"]
SENTENCES = st.lists(st.sampled_from(SAMPLE_WORDS), max_size=40).map(" ".join)
TEXTS = st.one_of(st.text(max_size=60), SENTENCES)
EXAMPLES = st.lists(st.tuples(TEXTS, TEXTS), max_size=6)


def one(func, text, **columns):
    [value] = func(["A prompt"], [text], **{name: [value] for name, value in columns.items()})
    return value


# The text measures


def test_words():
    assert words("Don't stop-now, R2D2! é") == ["Don't", "stop", "now", "R2D2"]
    assert words("... !?") == []


def test_distinct_2():
    # the cat, cat the, the cat: 2 of 3
    assert distinct_2(["The cat the CAT"]) == 2 / 3
    # a b, b a | a b: 2 of 3; pooled as one text there would be "a a" too, so 3 of 4
    assert distinct_2(["a b a", "a b"]) == 2 / 3
    assert distinct_2([]) == distinct_2(["one", ""]) == 0.0
    with pytest.raises(TypeError, match="'one two'"):
        distinct_2("one two")


def test_sentiment(monkeypatch):
    # VADER: "good" has valence 1.9, negation multiplies by -0.74, compound = v / sqrt(v^2 + 15),
    # rounded to four places.
    assert one(sentiment, "good") == pytest.approx((1 + round(1.9 / math.sqrt(18.61), 4)) / 2)
    v = -0.74 * 1.9
    expected = (1 + round(v / math.sqrt(v * v + 15), 4)) / 2
    assert one(sentiment, "not good") == pytest.approx(expected)
    assert one(sentiment, "") == one(sentiment, " \n") == one(sentiment, "The table.") == 0.5
    with monkeypatch.context() as patch:  # the lexicon is read once
        patch.delattr("vaderSentiment.vaderSentiment.SentimentIntensityAnalyzer")
        assert one(sentiment, "The table.") == 0.5


def test_brevity():
    assert one(brevity, "Yes.") == pytest.approx(0.951229424500714)
    assert one(brevity, "word " * 20) == pytest.approx(0.36787944117144233)
    assert one(brevity, "") == one(brevity, "...!") == 0.0


def test_brevity_strictly_decreasing():
    completions = [" ".join(["word"] * count) for count in range(1, 1000)]
    column = torch.tensor(brevity([""] * 999, completions))
    assert (column[1:] < column[:-1]).all()
    steps = column[:59] - column[1:60]
    assert steps.min() > 0.002


SYLLABLES = {
    1: "the cake whale walked called smiled likes tree played don't rhythm I 42 ' used",
    2: "table settled wanted needed wishes faces tables little idea",
    3: "important beautiful elephant",
    4: "education",
}


@pytest.mark.parametrize(
    ("count", "word"), [(count, word) for count, line in SYLLABLES.items() for word in line.split()]
)
def test_syllables(count, word):
    assert rewards.syllables(word) == rewards.syllables(word.upper()) == count


def test_readability():
    # 12 words, 12 of them different, 2 sentences,
    # syllables 4 + 1 + 3 and 3 + 2 + 1 + 1 + 2 + 1 + 2 + 1 + 2
    text = "Education is important. Every student needs a teacher and many books today"
    ease = 206.835 - 1.015 * 12 / 2 - 84.6 * 23 / 12
    assert ease == pytest.approx(38.595)
    assert one(readability, text) == pytest.approx(0.38595)
    # Parts of one and two words add words, no sentence.
    ease = 206.835 - 1.015 * 16 / 2 - 84.6 * 27 / 16
    assert one(readability, f"Oh! {text}... Be good! Yes?") == pytest.approx(ease / 100)


def test_readability_of_degenerate_text():
    assert one(readability, "") == one(readability, "?!") == 0.0
    # 6 words, 5 different; ease is 116.1 and is clipped.
    assert one(readability, "The cat sat on the mat.") == pytest.approx(0.5)
    assert one(readability, "Wow! Wow! Wow!") == pytest.approx(0.1)
    # 60 words, one sentence, one different word.
    ease = 206.835 - 1.015 * 60 - 84.6
    assert one(readability, "Wow! " * 60) == pytest.approx(0.1 * ease / 100)
    assert one(readability, "Go on now. " * 20) == pytest.approx(0.3)
    assert one(readability, "incomprehensibility " * 12) == 0.0
    story = "The little dog ran to the big red house. Then he sat down and ate a bone."
    assert one(readability, story) > 0.9


def test_diversity():
    assert diversity([""] * 4, ["a b a b", "a b c", "a", ""]) == [2 / 3, 1.0, 0.0, 0.0]


def test_rouge():
    # the longest common subsequence is: the cat on mat
    reference = "The cat was on a mat."
    assert one(rouge, "the cat sat on the mat", reference=reference) == pytest.approx(8 / 12)
    assert one(rouge, "mat the", reference="the mat") == 0.5
    assert one(rouge, "the cat", reference=["a dog", "the cat", "the"]) == 1.0
    assert one(rouge, "the cat sat here", reference=("the dog sat here", "no")) == 0.75
    assert one(rouge, "Don't", reference="don t") == 1.0
    assert one(rouge, "", reference="the") == one(rouge, "the", reference="") == 0.0
    assert one(rouge, "", reference="") == 0.0


def test_rouge_errors():
    with pytest.raises(ValueError, match=r"'reference'; columns that came: 'answer', 'topic'"):
        one(rouge, "a", answer="b", topic="c", completion_ids=[1])
    with pytest.raises(ValueError, match="columns that came: none"):
        one(rouge, "a")
    with pytest.raises(ValueError, match="shorter"):
        rouge(["p"] * 2, ["a", "b"], reference=["a"])
    assert rouge(["p"] * 2, ["a", "b"], reference=["a", None]) == [1.0, None]
    for bad in (3, [], ["a", None], {"a": 1}, [["a"]], b"a"):
        with pytest.raises(TypeError, match=r"'reference', row 1: expected a string or a list"):
            rouge(["p"] * 2, ["a", "b"], reference=["a", bad])


def subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    return table[-1][-1]


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.sampled_from(["a", "b", "cat", "dog", "1"]), min_size=1, max_size=12)] * 2)
def test_rouge_is_the_longest_common_subsequence(a, b):
    expected = 2 * subsequence(a, b) / (len(a) + len(b))
    assert one(rouge, " ".join(a), reference=" ".join(b)) == pytest.approx(expected)


@pytest.mark.parametrize("name", BUILTIN)
@settings(max_examples=60, deadline=None)
@given(examples=EXAMPLES, seed=st.integers(0, 99))
def test_range_determinism_permutation(name, examples, seed):
    def run(rows):
        texts = [text for text, _ in rows]
        return BUILTIN[name](["p"] * len(rows), texts, reference=[other for _, other in rows])

    values = run(examples)
    assert len(values) == len(examples)
    assert all(type(value) is float and 0 <= value <= 1 for value in values)
    assert run(examples) == values
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    assert run([examples[i] for i in order]) == [values[i] for i in order]


# The sequence classifier

LETTERS = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
    ids = {token: index for index, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture
def save(tmp_path, tokenizer):
    """save(kind=..., **config) -> (folder, model): random weights, large enough to matter."""
    import transformers as hf

    def make(kind="bert", name="model", with_tokenizer=True, **config):
        torch.manual_seed(0)
        config = {"vocab_size": 20, "max_position_embeddings": 16, "num_labels": 3} | config
        if kind == "distilbert":
            config = hf.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, **config)
            model = hf.DistilBertForSequenceClassification(config)
        else:
            sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = hf.BertConfig(**sizes, intermediate_size=8, **config)
            model = (hf.BertModel if kind == "bare" else hf.BertForSequenceClassification)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.eval().save_pretrained(tmp_path / name)
        if with_tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return make


@pytest.fixture
def offline(monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not asked


GOOD_BAD = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {}}


def logits_of(model, text):
    """One text by itself: no padding, and the last 12 words of it (16 - 2 - [CLS] and [SEP])."""
    ids = [2, *(4 + LETTERS.index(letter) for letter in text.split()[-12:]), 3]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("label", "index"), [(None, 2), ("bad", 0), ("fair", 1), ("1", 1), (0, 0), (2, 2)]
)
def test_classifier_label(save, offline, label, index):
    folder, model = save(**GOOD_BAD)
    reward = classifier(str(folder), label)
    prompts, completions = ["a b ", "c", "", "d e f "], ["c", " c a b d", "a", "g h i j k"]
    values = reward(prompts=prompts, completions=completions, reference=[1] * 4)
    pairs = zip(prompts, completions, strict=True)
    expected = [logits_of(model, a + b).softmax(-1)[index].item() for a, b in pairs]
    assert values == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 1.05 * min(expected)
    assert all(type(value) is float for value in values)


def test_classifier_label_name_wins_over_index(save):
    folder, model = save(id2label={0: "2", 1: "1", 2: "0"}, label2id={})
    expected = logits_of(model, "a b").softmax(-1)
    assert classifier(folder, "0")(["a "], ["b"]) == pytest.approx([expected[2].item()])
    assert classifier(folder, 0)(["a "], ["b"]) == pytest.approx([expected[0].item()])


@pytest.mark.parametrize("label", ["great", "", "3", -1, 3, True, 0.0])
def test_classifier_unknown_label(save, label):
    folder, _ = save(**GOOD_BAD)
    with pytest.raises(ValueError, match=r"no label .*'fair': 1"):
        classifier(folder, label)


def test_classifier_with_one_output(save):
    folder, model = save("distilbert", num_labels=1)
    texts = ["a b c", "d", "e f"]
    expected = [logits_of(model, text).sigmoid().item() for text in texts]
    assert classifier(folder)([""] * 3, texts) == pytest.approx(expected, abs=1e-6)


def test_classifier_multi_label(save):
    folder, model = save(problem_type="multi_label_classification", **GOOD_BAD)
    expected = logits_of(model, "a b c").sigmoid()[1].item()
    assert classifier(folder, "fair")(["a "], ["b c"]) == pytest.approx([expected])


def test_classifier_keeps_the_end_of_a_long_text(save):
    folder, model = save()
    text = " ".join(LETTERS * 3)
    expected = logits_of(model, text).softmax(-1)[2].item()
    assert classifier(folder)(["a b c "], [text]) == pytest.approx([expected], abs=1e-6)


def test_classifier_of_conversations(save):
    """By its own chat template, which writes special tokens itself; else the contents alone."""
    folder, model = save(**GOOD_BAD)
    prompt = [{"role": "user", "content": "a b"}]
    completion = [{"role": "assistant", "content": "c d"}]
    expected = logits_of(model, "a b c d").softmax(-1)[2].item()
    assert classifier(folder)([prompt], [completion]) == pytest.approx([expected], abs=1e-6)
    edit = json.loads((folder / "tokenizer_config.json").read_text())
    edit["chat_template"] = "[CLS]{% for m in messages %} {{ m.content }} k k{% endfor %}[SEP]"
    (folder / "tokenizer_config.json").write_text(json.dumps(edit))
    rendered = logits_of(model, "a b k k c d k k").softmax(-1)[2].item()
    assert classifier(folder)([prompt], [completion]) == pytest.approx([rendered], abs=1e-6)
    assert abs(rendered - expected) > 1e-3
    assert classifier(folder)(["a b "], ["c d"]) == pytest.approx([expected], abs=1e-6)


@pytest.fixture
def calls(monkeypatch):
    """(input ids, gradients on, training) of every forward pass."""
    from transformers import BertForSequenceClassification

    seen, forward = [], BertForSequenceClassification.forward

    def record(self, input_ids, **kwargs):
        seen.append((input_ids.tolist(), torch.is_grad_enabled(), self.training))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", record)
    return seen


def random_texts(count):
    draw = random.Random(0)
    return [" ".join(draw.choices(LETTERS, k=draw.randint(1, 30))) for _ in range(count)]


def test_classifier_batches_and_permutation(save, calls):
    folder, _ = save()
    reward, texts = classifier(folder), random_texts(70)
    values = reward([""] * 71, [*texts, texts[5]])
    assert [len(batch) for batch, _, _ in calls] == [32, 32, 6]
    assert not any(grad or training for _, grad, training in calls)
    assert values[70] == values[5]
    assert len(set(values)) > 60 and all(0 <= value <= 1 for value in values)
    assert reward([""] * 71, [*texts, texts[5]]) == values
    # The passes are the same whatever the order, so equality does not hang on the rounding.
    order = random.Random(1).sample(range(70), 70)
    assert reward([""] * 70, [texts[i] for i in order]) == [values[i] for i in order]
    assert calls[:3] == calls[3:6] == calls[6:]
    assert reward([], []) == []


def test_classifier_without_common_padding(save, calls):
    folder, model = save(pad_token_id=7)
    texts = random_texts(3)
    values = classifier(folder)([""] * 3, texts)
    assert [len(batch) for batch, _, _ in calls] == [1, 1, 1]
    expected = [logits_of(model, text).softmax(-1)[2].item() for text in texts]
    assert values == pytest.approx(expected, abs=1e-6)


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_classifier_refuses_what_is_no_classifier(save, tmp_path, offline):
    folder, model = save()
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "none", tmp_path / "empty", folder / "config.json", "some/model"):
        with pytest.raises(ValueError, match="is not a folder with a sequence classifier"):
            classifier(missing)
    with pytest.raises(ValueError, match=r"weights lack \['classifier\.bias', 'classifier\.weight"):
        classifier(save("bare", name="bare")[0])
    with pytest.raises(ValueError, match="tokens in its tokenizer"):
        classifier(save(name="tokenless", with_tokenizer=False)[0])
    with pytest.raises(ValueError, match="20 tokens in its tokenizer, 9 in its model"):
        classifier(save(name="small", vocab_size=9)[0])

    def broken(name):
        return shutil.copytree(folder, tmp_path / name)

    (broken("adapter") / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json; merge the adapter first"):
        classifier(tmp_path / "adapter")
    weights = (folder / "model.safetensors").read_bytes()
    (broken("cut") / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (broken("json") / "config.json").write_text("{")
    edit_config(broken("shape"), intermediate_size=16)
    edit_config(broken("type"), model_type="unheard_of")
    torch.save(model.state_dict(), broken("pickle") / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    for name in ("cut", "json", "shape", "type", "pickle"):
        with pytest.raises(ValueError, match=f"{name}' is not a folder with a sequence classifier"):
            classifier(tmp_path / name)


def test_classifier_stays_local(save, monkeypatch):
    import transformers

    asked = []
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForSequenceClassification"):
        auto = getattr(transformers, name)

        def spy(path, load=auto.from_pretrained, **options):
            asked.append((options.get("local_files_only"), options.get("trust_remote_code")))
            return load(path, **options)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    classifier(save()[0])
    assert len(asked) >= 3 and set(asked) == {(True, False)}


def test_classifier_runs_no_code_of_the_folder(save, tmp_path, offline):
    folder, _ = save()
    expected = classifier(folder)(["a "], ["b"])
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForSequenceClassification")
    code = dict.fromkeys(names, "evil.Evil")
    edit_config(folder, auto_map=code, _attn_implementation="evil/kernel")
    assert classifier(folder)(["a "], ["b"]) == expected
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(ValueError, match="sequence classifier"):
        classifier(folder)
    assert not (tmp_path / "ran").exists()


# Specs


def test_load_rewards(monkeypatch):
    monkeypatch.setattr(rewards, "classifier", lambda *args: args)
    specs = ["joy=sentiment", "brevity", "safe=classifier:/a=b/c:d#e#not toxic", "_2=classifier:x"]
    loaded = load_rewards(specs)
    assert list(loaded) == ["joy", "brevity", "safe", "_2"]
    assert loaded["joy"] is sentiment and loaded["brevity"] is brevity
    assert loaded["safe"] == ("/a=b/c:d#e", "not toxic") and loaded["_2"] == ("x",)
    assert list(BUILTIN) == ["sentiment", "brevity", "readability", "diversity", "rouge"]
    assert list(load_rewards(tuple(BUILTIN)).values()) == list(BUILTIN.values())


def test_load_rewards_classifier(save):
    folder, _ = save(**GOOD_BAD)
    loaded = load_rewards([f"safe=classifier:{folder}#bad", "brevity"])
    assert loaded["safe"](["a "], ["b"]) == classifier(folder, "bad")(["a "], ["b"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one of sentiment, .*, classifier"),
        (["sentimant"], r"'sentimant' is none of .*rouge, classifier; did you mean 'sentiment'\?"),
        (["x=Rouge"], r"'x=Rouge' is none of .*did you mean 'rouge'\?"),
        (["x=clasifier:p"], r"did you mean 'classifier'\?"),
        (["zzz"], "is none of .*classifier; your own go to CLPTrainer in Python$"),
        ([""], "'' is none of"),
        (["x=sentiment:0"], "is none of"),
        ([" brevity"], "is none of"),
        (["brevity", "brevity"], "already an objective 'brevity'"),
        (["x=brevity", "x=sentiment"], "'x=sentiment': there is already an objective 'x'"),
        (["x=brevity", "X=sentiment"], "already an objective 'X'"),
        (["=brevity"], "'' must match"),
        (["../up=brevity"], "'../up' must match"),
        (["a b=brevity"], "'a b' must match"),
        (["2nd=brevity"], "'2nd' must match"),
        (["é=brevity"], "'é' must match"),
        (["x\n=brevity"], "must match"),
        ([f"{'x' * 65}=brevity"], "must match"),
        (["classifier:p"], r"write objective=classifier:PATH\[#label\]"),
        (["classifier:/a=b"], "write objective="),
        (["classifier"], "write objective="),
        (["x=classifier"], "write objective="),
        (["x=classifier:"], "write objective="),
        (["x=classifier:#good"], "write objective="),
        (["x=classifier:p#"], "write objective="),
    ],
)
def test_load_rewards_errors(specs, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(specs)


def test_load_rewards_types():
    for bad in ("sentiment", ["brevity", 1], [None]):
        with pytest.raises(TypeError, match="must be a list of strings, got"):
            load_rewards(bad)


def test_load_rewards_checks_all_before_it_loads(monkeypatch):
    loaded = []
    monkeypatch.setattr(rewards, "classifier", lambda *args: loaded.append(args))
    with pytest.raises(ValueError, match="none of"):
        load_rewards(["x=classifier:p", "nothing"])
    assert loaded == []
