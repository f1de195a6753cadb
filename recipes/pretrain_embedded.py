"""Pre-train the small OLMoE model that comes with the package, from scratch on generated text.

    python recipes/pretrain_embedded.py -o build/embedded

The script contains all steps: text, tokenizer, model, training, files. `recipes/measure_embedded.py` then checks that
the result is suitable for experiments, and completes the model card.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from apportion.data.tasks import TaskRow, task_rows

# Each task: its share of the documents, and options that make it easy enough for a small model. The tasks with a
# small share are meant for fine-tuning: the model knows their form, but cannot solve them.
MIXTURE: dict[str, tuple[float, dict[str, object]]] = {
    "aiw": (0.2, {}),
    "calendar_arithmetic": (1.0, {"tasks": ["weekday_offset", "weekday_of_date", "is_leap_year"]}),
    "chain_sum": (2.0, {"max_terms": 3, "max_digits": 2}),
    "count_bits": (1.0, {"max_n": 4095}),
    "family_relationships": (0.2, {}),
    "gcd": (1.0, {"max_value": 100}),
    "leg_counting": (0.5, {"min_animals": 2, "max_animals": 3, "max_instances": 12}),
    "letter_counting": (1.0, {"max_words": 8}),
    "number_filtering": (1.0, {"max_numbers": 6, "max_decimals": 1}),
    "number_format": (1.0, {"max_num_candidates": 3, "max_n": 1000000}),
    "number_sequence": (1.0, {"max_complexity": 1}),
    "number_sorting": (0.2, {"max_numbers": 5, "max_decimals": 0}),
    "products": (1.0, {"max_digits": 2}),
    "sentence_reordering": (1.0, {"max_words_in_sentence": 6}),
    "simple_geometry": (1.0, {"max_sides": 4}),
    "spell_backward": (2.0, {"max_word_len": 5}),
    "syllogism": (1.0, {}),
    "time_intervals": (1.0, {"task_types": ["time"]}),
    "word_sorting": (1.0, {"max_words": 5, "max_word_length": 8}),
    "color_cube_rotation": (0.2, {"max_rotations": 1}),
    "word_sequence_reversal": (0.2, {"max_words": 5}),
    "needle_haystack": (0.2, {"min_num_statements": 3, "max_num_statements": 6}),
}
VOCABULARY = 2048
BLOCK = 256  # tokens a training sequence
PROMPT_LOSS_FRAC = 0.25  # share of the documents whose prompt is learned too; the others teach the answer alone
EOS = "<eos>"
PAD = "<pad>"


class PackedBlocks(Dataset):
    """Concatenated documents, split into blocks of equal length, with labels -100 for ignored tokens."""

    def __init__(self, rows: list[TaskRow], tokenizer: Tokenizer, seed: int) -> None:
        rng = random.Random(seed)
        prompts = tokenizer.encode_batch([row["prompt"] for row in rows])
        completions = tokenizer.encode_batch([row["completion"] + EOS for row in rows])
        ids: list[int] = []
        labels: list[int] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            learn_prompt = rng.random() < PROMPT_LOSS_FRAC
            ids += prompt.ids + completion.ids
            labels += (prompt.ids if learn_prompt else [-100] * len(prompt.ids)) + completion.ids
        blocks = len(ids) // BLOCK
        self.ids = torch.tensor(ids[: blocks * BLOCK]).view(blocks, BLOCK)
        self.labels = torch.tensor(labels[: blocks * BLOCK]).view(blocks, BLOCK)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def make_documents(num_documents: int, seed: int) -> list[TaskRow]:
    """Draw each task's share of documents, and shuffle."""
    total = sum(share for share, _ in MIXTURE.values())
    rows = [
        row
        for name, (share, config) in MIXTURE.items()
        for row in task_rows(
            name, "train", num_rows=max(1, round(num_documents * share / total)), seed=seed, config=config
        )
    ]
    random.Random(seed).shuffle(rows)
    return rows


def train_tokenizer(rows: list[TaskRow]) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which every digit is a separate token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int) -> OlmoeForCausalLM:
    """Make the untrained model: 4 layers of 16 experts, 4 per token."""
    transformers.set_seed(seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_experts=16,
            num_experts_per_tok=4,
            max_position_embeddings=2048,
            initializer_range=0.05,
            router_aux_loss_coef=0.005,
            output_router_logits=True,
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
            bos_token_id=None,
        )
    )


def main() -> None:
    """Train and write the model, its tokenizer and the facts for its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    start = time.time()
    tokens_needed = args.steps * args.batch_size * BLOCK
    sample = make_documents(20_000, args.seed + 1)
    tokenizer = train_tokenizer(sample)
    tokens_per_document = sum(
        len(e.ids) for e in tokenizer.encode_batch([r["prompt"] + r["completion"] for r in sample])
    ) / len(sample)
    rows = make_documents(int(tokens_needed / tokens_per_document * 1.02), args.seed)
    blocks = PackedBlocks(rows, tokenizer, args.seed)
    model = build_model(tokenizer, args.seed)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(rows):,} documents, {blocks.ids.numel():,} tokens, {num_parameters:,} parameters")

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            logging_steps=50,
            save_steps=1000,
            save_total_limit=1,
            seed=args.seed,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=blocks,
    )
    trainer.train()

    model.config.output_router_logits = False
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(args.output)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="left")
    wrapped.save_pretrained(args.output)
    facts = {
        "command": f"python recipes/pretrain_embedded.py -o {args.output} --steps {args.steps}",
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * args.batch_size * BLOCK,
        "documents": len(rows),
        "parameters": num_parameters,
        "mixture": {name: {"documents_frac": share, **config} for name, (share, config) in MIXTURE.items()},
        "loss": [{k: e[k] for k in ("step", "loss")} for e in trainer.state.log_history if "loss" in e][-1]
        | {"first": next(e["loss"] for e in trainer.state.log_history if "loss" in e)},
        "wall_time_s": round(time.time() - start),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    (args.output / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["loss"]))


if __name__ == "__main__":
    main()
