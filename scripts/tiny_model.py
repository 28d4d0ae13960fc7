"""Make the small model that comes with clp: `python scripts/tiny_model.py` writes `clp/tiny/`.

The folder holds a Llama of 0.9 million parameters, its tokenizer, and prompts. Everything is made
here from nothing: the stories come from the grammar in `stories.py`, the tokenizer and the model
are trained on them. The same seed gives the same stories, prompts and tokenizer everywhere, and the
same weights on the same kind of processor. It takes about twelve minutes of one core.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from stories import opening, story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

STORIES, HELD_OUT_STORIES = 80_000, 2_000
PROMPTS, HELD_OUT_PROMPTS = 512, 128
VOCABULARY, CONTEXT, BATCH = 1024, 256, 64
SPECIAL = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)
PEAK_RATE, WARM_UP = 4e-3, 100


def write_prompts(path: Path, count: int, held_out: bool, rng: random.Random) -> None:
    """Write `count` different opening sentences, one JSON object per line."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[opening(rng, held_out)[0]] = None
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each word of the stories is one token.

    A vocabulary this small would spend most of its places on the steps towards a word. So the
    words themselves take their places first, the learned merges get what is left, and
    `ignore_merges` lets a word be found without its steps. Any other text falls back to bytes.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in byte_level.pre_tokenize_str(text))
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = byte_level
    learned.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=byte_level.alphabet(), show_progress=False
        ),
    )
    entries = SPECIAL + sorted(byte_level.alphabet())
    entries += [
        word
        for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))
        if word not in entries
    ]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"the stories need {len(vocabulary)} tokens, more than {VOCABULARY}")
    merges = []
    for left, right in json.loads(learned.to_str())["model"]["merges"]:
        if left + right not in vocabulary and len(vocabulary) == VOCABULARY:
            break
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=CONTEXT, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_model() -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.06,  # with 0.02 it learns to copy names far later
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def batches(rows: list[list[int]], rng: random.Random):
    """Endless batches of token ids, padded on the right; rows of like length stand together."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - 16 * BATCH + 1, 16 * BATCH):
            group = sorted(order[start : start + 16 * BATCH], key=lambda index: len(rows[index]))
            for first in rng.sample(range(0, 16 * BATCH, BATCH), 16):
                yield pad([rows[index] for index in group[first : first + BATCH]])


def pad(rows: list[list[int]]) -> torch.Tensor:
    """`[rows, longest]` token ids."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def token_loss(model: LlamaForCausalLM, tokens: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross-entropy (nats per token) of every token after the first; padding does not count."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD, reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean loss (nats per token) on stories whose hero and thing never met in training."""
    parts = [pad(rows[start : start + 128]) for start in range(0, len(rows), 128)]
    total = sum(token_loss(model, part, "sum").item() for part in parts)
    return total / sum(len(row) - 1 for row in rows)


def train(
    model: LlamaForCausalLM,
    rows: list[list[int]],
    held_out: list[list[int]],
    steps: int,
    rng: random.Random,
) -> None:
    """AdamW with warm-up and a cosine to zero, the held-out loss ten times on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    source, smooth = batches(rows, rng), None
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * cosine
        loss = token_loss(model, next(source), "mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % max(1, steps // 10) == 0:
            tqdm.write(
                f"step {step + 1}: training loss {smooth:.3f}, "
                f"held-out loss {held_out_loss(model, held_out):.3f}"
            )


def report(stories: list[list[str]]) -> None:
    """Print what the corpus is like: sizes, and the sentiment of its sentences."""
    score = SentimentIntensityAnalyzer().polarity_scores
    sentences = [sentence for each in stories[:4000] for sentence in each[1:]]
    compounds = [score(sentence)["compound"] for sentence in sentences]
    words = [len(sentence.split()) for sentence in sentences]
    print(f"{len(stories)} stories, {len(sentences) / 4000:.2f} sentences after the opening")
    for mood, sign in (("plain", 0), ("sad", -1), ("happy", 1)):
        own = [index for index, value in enumerate(compounds) if (value > 0) - (value < 0) == sign]
        print(
            f"{mood}: {len(own) / len(sentences):.1%} of the sentences, "
            f"{sum(words[i] for i in own) / len(own):.1f} words, "
            f"compound {sum(compounds[i] for i in own) / len(own):+.2f}"
        )


def main() -> None:
    """Read the options and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("clp/tiny"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.time()
    torch.set_num_threads(1)  # as fast as two for matrices this small, and the same sums anywhere
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    stories = [story(rng) for _ in tqdm(range(STORIES), desc="stories", unit="story")]
    unseen = [story(rng, held_out=True) for _ in range(HELD_OUT_STORIES)]
    report(stories)
    write_prompts(options.output / "prompts.jsonl", PROMPTS, False, rng)
    write_prompts(options.output / "heldout.jsonl", HELD_OUT_PROMPTS, True, rng)

    tokenizer = train_tokenizer(list(map(" ".join, stories)))
    rows, unseen_rows = (
        [[*ids, EOS] for ids in tokenizer(list(map(" ".join, part))).input_ids]
        for part in (stories, unseen)
    )
    model = new_model()
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters")
    train(model, rows, unseen_rows, options.steps, rng)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=64, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
    )  # fmt: skip
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"wrote {options.output} in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
