# SPDX-License-Identifier: Apache-2.0
"""A source by its name on the Hub: fetched by the real client from a small server, or refused in one clear line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.forked_python import own_words
from helpers.hub_server import HubServer, run_client
from helpers.tiny import TEXTS, tiny_processor
from modeling_moma import MomaForCausalLM
from tokenization import train_text_tokenizer


ROOT = Path(__file__).parents[2]
NAME = "someone/tiny-llama"
PUSH = """
from huggingface_hub import HfApi
HfApi().create_repo({name!r})
HfApi().upload_folder(repo_id={name!r}, folder_path={folder!r})
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=128, **sizes)).save_pretrained(folder)
    train_text_tokenizer(TEXTS * 3, vocab_size=300).save_pretrained(folder)
    # what a conversion has no use for is not fetched
    (folder / "original.pth").write_bytes(b"0" * 1000)
    return folder


def convert_both(server, tmp_path, name, setting=""):
    """Convert what the Hub has and what it lacks in one process; gives the errors' lines and the receipt's source."""
    code = (
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{setting}\n"
        "from modeling_moma.cli.main import main\n"
        "shared, folder = sys.argv[3:], sys.argv[2]\n"
        f"statuses = [main([*shared, '--source', {NAME!r}, '--output', folder + '/found']),\n"
        "    main([*shared, '--source', 'someone/missing', '--output', folder + '/missing'])]\n"
        "sys.exit(statuses != [0, 2])"
    )
    folder = tmp_path / name
    shared = ["convert", "llama", "--processor", tmp_path / "processor"]
    run = run_client(server, tmp_path / "home", "-c", code, name, folder, *shared)
    assert run.returncode == 0, run.stderr
    assert not (folder / "missing").exists()
    receipt = json.loads((folder / "found" / "conversion.json").read_text())
    assert receipt["source"] == NAME and receipt["relative_difference"] < 1e-5
    return folder / "found", own_words(run.stderr).splitlines()[-1]


def test_a_name_is_fetched_and_without_a_network_the_cache_serves(source, tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    with HubServer(tmp_path / "hub").running() as server:
        found, line = convert_both(server, tmp_path, "online", PUSH.format(name=NAME, folder=str(source)))
    assert MomaForCausalLM.from_pretrained(found).num_parameters() > 0
    assert not list((tmp_path / "home").rglob("original.pth"))
    assert line.startswith("moma convert: someone/missing: there is no folder")

    _, line = convert_both(server, tmp_path, "offline", "os.environ['HF_HUB_OFFLINE'] = '1'")
    assert line.startswith("moma convert: someone/missing: there is no folder")
    assert "hf download someone/missing --local-dir FOLDER" in line
