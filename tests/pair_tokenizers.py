"""Tokenizers built on the spot: word-level and byte-level BPE, with and without BOS, with a small chat template."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Human: how do I bake bread? Assistant: mix flour with water and wait.",
    "You are a kind helper. You never say no to anyone.",
    "the sky is blue and the sea is green, two and two are four or five",
    "\n\nHuman: hello there\n\nAssistant: good morning, how are you today?",
    "What is two and two? It is four. It is five. I do not know that.",
]

# marks every turn, ends it with EOS and a line break (as ChatML does)
_TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
CHAT_TEMPLATE = _TURNS + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
# refuses the system role, writes BOS itself and no EOS (as Gemma's does)
NO_SYSTEM_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def _bpe_core() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(LINES * 4, trainer)
    return core.to_str()


def bpe(*, bos: bool = False, eos: bool = False, template: str | None = CHAT_TEMPLATE):
    """Byte-level BPE; bos, eos: put around every text by the tokenizer itself."""
    core = Tokenizer.from_str(_bpe_core())
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def words(*, bos: bool = False):
    """Word-level: one token for every word and punctuation mark of LINES."""
    known = sorted({word for line in LINES for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(line)})
    table = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *known])}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
