"""The tokenizer of a GGUF file is the one that the file describes."""

from types import SimpleNamespace

import gguf
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import ModelError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTROL, NORMAL = 3, 1


def write(path, *, pre, eos=2):
    """A Llama's metadata and a byte-level BPE that joins the digits 1 and 2; no tensors."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "12", "Ġ1"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def load(tmp_path):
    def load(**values):
        path = tmp_path / "tiny.gguf"
        write(path, **values)
        return load_tokenizer(
            SimpleNamespace(
                model=str(path), tokenizer=None, revision=None, chat_template=None, trust_remote_code=False
            )
        )

    return load


def test_special_tokens_are_those_of_the_file(load):
    tokenizer = load(pre="smollm")
    found = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert found == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer("a<|im_end|>").input_ids[-1] == tokenizer.eos_token_id == 2


def test_numbers_are_taken_digit_by_digit_where_the_file_says_so(load):
    assert load(pre="smollm")("a12 12").tokens() == ["a", "1", "2", "Ġ", "1", "2"]
    assert load(pre="gpt-2")("a12 12").tokens() == ["a", "12", "Ġ", "12"]


def test_an_end_that_the_vocabulary_does_not_have(load):
    with pytest.raises(ModelError, match="eos_token has the number 999") as error:
        load(pre="smollm", eos=999)
    assert "--tokenizer" in str(error.value)
