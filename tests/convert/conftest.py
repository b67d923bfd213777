# SPDX-License-Identifier: Apache-2.0
import pytest

from helpers.text_sources import CONFIGS, save_source
from helpers.tiny import TEXTS, tiny_processor
from modeling_moma.convert.llama import convert_llama
from tokenization import train_text_tokenizer


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS * 3, vocab_size=300)


@pytest.fixture
def source(tmp_path, tokenizer):
    folder = tmp_path / "source"
    save_source(folder, CONFIGS["llama"], tokenizer, max_shard_size="20KB")
    return folder


@pytest.fixture
def convert(tmp_path, processor_folder):
    def run(source, **kwargs):
        return convert_llama(source, tmp_path / "moma", processor=processor_folder, **kwargs)

    return run
