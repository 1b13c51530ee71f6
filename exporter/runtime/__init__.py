"""Running engines: tokenizer, chat template, generation, benchmark. Needs numpy, tokenizers, jinja2 and the
target's runtime; neither torch nor transformers."""
