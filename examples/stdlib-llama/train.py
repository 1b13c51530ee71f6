"""Train the example model: a 7-million-parameter Llama on the Python standard library's sources.

    python train.py --out DIR [--tokens 6144000]

Writes a Hugging Face checkpoint (bf16 safetensors), its tokenizer and the held-out text to DIR. Run again with
the same DIR, it goes on from the state it saved last. Needs torch, transformers and tokenizers; about an hour on
two cores.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
from corpus import held_out_text, library_root, read_source, training_documents, training_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, END = "<s>", "</s>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STATE = "training.pt"
VOCABULARY, CONTEXT, BATCH, SEED = 4096, 1024, 4, 0


def train_tokenizer(files: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(files, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Grouped-query attention, tied embeddings, head_dim apart from hidden / heads, widths multiples of 256."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )


def packed_tokens(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one token stream [T], each between BOS and EOS."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.95))
    return [muon, adamw]


def learning_rate_factor(step: int, steps: int) -> float:
    """Short warm-up, then a linear decay to zero over the second half."""
    warm_up, decay_start = min(100, steps // 10), steps // 2
    return min((step + 1) / warm_up, 1.0, max(0.0, (steps - step) / (steps - decay_start)))


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats over ids [B, S + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: torch.Tensor, tokens: int, out: Path) -> None:
    """One pass after another over shuffled windows of the stream until `tokens` were seen."""
    generator = torch.Generator().manual_seed(SEED)
    window, steps = CONTEXT + 1, tokens // (BATCH * CONTEXT)
    first = resume(model, out / STATE)
    tools = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(t, lambda s: learning_rate_factor(first + s, steps)) for t in tools]
    starts = torch.empty(0, dtype=torch.long)
    begin = time.time()
    generator.manual_seed(SEED + first)
    for step in range(first, steps):
        if len(starts) < BATCH:
            offset = int(torch.randint(window, (1,), generator=generator))
            starts = offset + window * torch.randperm((len(stream) - offset) // window, generator=generator)
        chosen, starts = starts[:BATCH], starts[BATCH:]
        loss = batch_loss(model, torch.stack([stream[s : s + window] for s in chosen.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool, schedule in zip(tools, schedules, strict=True):
            tool.step()
            schedule.step()
        model.zero_grad()
        if step % 20 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.time() - begin:.0f} s", flush=True)
        if step % 100 == 99:
            torch.save({"step": step + 1, "model": model.state_dict()}, out / STATE)


def resume(model: LlamaForCausalLM, state: Path) -> int:
    """Load the weights an interrupted run saved; the step to go on from. The optimizers start afresh."""
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    model.load_state_dict(saved["model"])
    return int(saved["step"])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """exp of the mean next-token cross entropy over ids [T], in windows of the context length."""
    total, count = 0.0, 0
    for window in ids.split(CONTEXT):
        if len(window) > 1:
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return math.exp(total / count)


def unigram_perplexity(train_ids: torch.Tensor, ids: torch.Tensor) -> float:
    """Perplexity of the training text's token frequencies (add-one smoothed) on ids [T]."""
    counts = Counter(train_ids.tolist())
    total = len(train_ids) + VOCABULARY
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids.tolist()) / len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6_144_000)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    if options.threads:
        torch.set_num_threads(options.threads)
    root = library_root()
    tokenizer = train_tokenizer([read_source(path) for path in training_files(root)])
    tokenizer.save_pretrained(options.out)
    (options.out / "heldout.txt").write_text(held_out_text(root), encoding="utf-8")
    model = LlamaForCausalLM(model_config(tokenizer))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    stream = packed_tokens(training_documents(root, SEED), tokenizer)
    held_out = torch.tensor(tokenizer(held_out_text(root))["input_ids"])
    print(f"{model.num_parameters()} parameters, {len(stream)} training tokens, {len(held_out)} held out", flush=True)
    train(model, stream, options.tokens, options.out)
    model = model.to(torch.bfloat16)
    model.save_pretrained(options.out)
    (options.out / STATE).unlink(missing_ok=True)
    print(f"held-out perplexity {perplexity(model.float(), held_out):.2f}, ", end="")
    print(f"unigram {unigram_perplexity(stream, held_out):.1f}")


if __name__ == "__main__":
    main()
