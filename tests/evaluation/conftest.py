import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

BERT = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)


@pytest.fixture
def make_gpt2():
    def make(seed=0, n_layer=1):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=256, n_embd=16, n_layer=n_layer, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture
def make_classifier():
    def make(num_labels=3, tokens=False, seed=0):
        torch.manual_seed(seed)
        head = BertForTokenClassification if tokens else BertForSequenceClassification
        model = head(BertConfig(num_labels=num_labels, **BERT)).eval()
        # weights of a few hundredths give all rows nearly the same logits, and orders could be wrong unseen
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.5)
        return model

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token for each byte, ids 0 to 255: text and ids are counted at a glance."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
