"""A small byte-level BPE tokenizer for random checkpoints, trained on a few standard library sources."""

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
BOS, EOS = "<s>", "</s>"
SOURCES = ("argparse.py", "ast.py", "datetime.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def write_tokenizer(out: Path) -> None:
    """tokenizer.json and tokenizer_config.json; ids 0 and 1 are beginning and end of a sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer.train([str(library / name) for name in SOURCES if (library / name).exists()], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1 << 17,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
