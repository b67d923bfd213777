# SPDX-License-Identifier: Apache-2.0
"""What a newcomer gives a subcommand by mistake: one line that names option, value and likely cause, and status 2."""

import json
import os
import shlex
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.hub_server import HubServer
from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma import MomaForCausalLM
from modeling_moma.cli.main import main


def write_photos(folder):
    folder.mkdir(parents=True)
    for index, image in enumerate(noise_images(12)):
        image.save(folder / f"{index}.png")
    lines = ["file_name,text", *(f"{index}.png,thing {index}" for index in range(12))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of trainings: whole ones, unfinished ones, damaged ones."""
    place = tmp_path_factory.mktemp("place")
    processor = tiny_processor()
    processor.save_pretrained(place / "proc")
    processor.vq_model.save_pretrained(place / "vq")
    tiny_model(processor).save_pretrained(place / "model")
    for name in ("empty", "begun", "unfinished/checkpoint-20", "tokens", "half-tokens"):
        (place / name).mkdir(parents=True)
    for name in ("begun", "unfinished"):
        (place / name / "run.json").write_text("{}")
    (place / "half-tokens" / "job.json").write_text("{}")
    (place / "tokens" / "manifest.json").write_text("{")
    shutil.copytree(place / "model", place / "no-weights")
    (place / "no-weights" / "model.safetensors").unlink()
    shutil.copytree(place / "model", place / "few-weights")
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "few-weights" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    shutil.copytree(place / "model", place / "no-threshold")
    weights = place / "no-threshold" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.endswith(".threshold")}
    save_file(kept, weights, metadata={"format": "pt"})
    adapted = MomaForCausalLM.from_pretrained(place / "model")
    get_peft_model(adapted, LoraConfig(target_modules=["q_proj"])).save_pretrained(place / "adapters")
    shutil.copytree(place / "proc", place / "no-codebook")
    tensors = load_file(place / "proc" / "vq_model" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("quantize.")}
    save_file(kept, place / "no-codebook" / "vq_model" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(place / "model", place / "cut")
    os.truncate(place / "cut" / "model.safetensors", 500)
    shutil.copytree(place / "proc", place / "half-proc")
    shutil.rmtree(place / "half-proc" / "vq_model")
    shutil.copytree(place / "proc", place / "bad-proc")
    (place / "bad-proc" / "processor_config.json").write_text("{")
    write_photos(place / "photos")
    for name, data in (("r", "photos"), ("typo", "phots"), ("deep", "data/photos")):
        fields = {"data": data, "image": "image", "text": "text", "held_out": 0.3}
        (place / f"{name}.yaml").write_text(json.dumps({"sources": {"pics": fields}}))
    return place


@pytest.fixture
def run(place, monkeypatch, capfd):
    """Runs `moma` there, with a Hub that nobody answers for, and gives its one line."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.chdir(place)

        def run(line):
            problem = None
            try:
                status = main(shlex.split(line))
            except SystemExit as end:
                status = end.code
            except Exception as error:
                status, problem = None, f"traceback of {type(error).__name__}"
            out, err = capfd.readouterr()
            # progress bars end in a carriage return
            lines = [part for part in err.splitlines() if part.strip() and "Loading weights" not in part]
            assert (status, problem, out) == (2, None, "")
            assert len(lines) == 1, lines
            return lines[0]

        yield run


BUILD = "build-processor r.yaml --output out --image-tokenizer"
PRETRAIN = "pretrain --processor proc --output out --tokens"
UNREACHED = "and the Hub, where it might be, cannot be reached"
BAD = {
    f"{BUILD} ./vqq": "`--image-tokenizer` './vqq': there is no folder './vqq'",
    f"{BUILD} mine/vq": f"`--image-tokenizer` 'mine/vq': .*{UNREACHED}",
    f"{BUILD} empty": "`--image-tokenizer` 'empty' has no config.json: the folder is",
    f"{BUILD} unfinished": "`moma train-image-tokenizer ... --resume`",
    f"{BUILD} model": "a model of type 'moma', not of an image tokenizer",
    f"{BUILD} proc": "the folder holds a processor",
    f"{BUILD} r.yaml": "`--image-tokenizer` 'r.yaml' is a file",
    f"{BUILD} vq --set processor.text_tokenizer=./no": "processor: text_tokenizer` './no': there is",
    "tokenize r.yaml --output out --processor porc": f"'porc' (did you mean 'proc'?), {UNREACHED}",
    "tokenize r.yaml --output out --processor half-proc": "`--processor` 'half-proc' has no vq_model/config.json",
    "tokenize r.yaml --output out --processor bad-proc": "'bad-proc': the processor in it cannot be read",
    "tokenize r.yaml --output out --processor model": "has no processor_config.json: the folder holds a model alone",
    "tokenize typo.yaml --output out --processor proc": "'pics': there is no folder 'phots' (did you mean 'pho",
    "tokenize deep.yaml --output out --processor proc": f"'pics': there is no folder 'data/photos', {UNREACHED}",
    "upcycle --output out --model ./modle": "`--model` './modle': there is no folder './modle' (did you mean 'model'",
    f"{PRETRAIN} tokens --model unfinished": "'tokens/manifest.json': it cannot be read as JSON",
    f"{PRETRAIN} tokns --model model": "`--tokens` 'tokns': there is no folder 'tokns' (did you mean 'tokens'?)",
    f"{PRETRAIN} half-tokens --model model": "`moma tokenize` has not finished there; start it again",
    f"{PRETRAIN} photos --model model": "`--tokens` 'photos' has no manifest.json",
    "calibrate --processor proc --tokens tokens --output out --model unfinished": "its training is not finished",
    "calibrate --processor ./x --tokens tokens --output out --model model": "`--processor` './x': there is no folder",
    "train-auxiliary-routers --model model --processor vq --tokens tokens --output out": "holds an image tokenizer",
    "train-auxiliary-routers --model model --processor proc --tokens no --output out": "`--tokens` 'no': there is no",
    "evaluate --model model --tokens tokens": "`--model` 'model' has no processor_config.json",
    "evaluate --model cut --tokens tokens": "`--model` 'cut': the model in it cannot be read",
    "evaluate --model no-weights --tokens tokens": "has no model.safetensors: its weights are missing",
    "upcycle --output out --model few-weights": "config.json describes are missing, such as 'model.layers.2.",
    "upcycle --output out --model no-threshold": "are missing, such as 'model.layers.0.mlp.groups.image.router.thre",
    "upcycle --output out --model adapters": "`--model` 'adapters' holds adapters over '.*', and whole weights",
    "generate --prompt x --model few-weights": "`--model` 'few-weights' has no processor_config.json",
    "tokenize r.yaml --output out --processor no-codebook": "MomaVQModel are missing, such as 'quantize.",
    f"{BUILD} vq --set processor.vocab_sise=99": "Did you mean 'vocab_size'",
    "convert llama --output out --processor proc --source r.yaml": "r.yaml: it is a file, and the folder",
    "convert vqgan --output model --source r.yaml": "model: it exists and is not empty",
    "convert vqgan --output r.yaml/x --source r.yaml": "--output: nothing can be written into",
    "add-layers --output out --model model --after 2": "`after` = [2]: give indices of layers, counted from 0, of wh",
    "add-layers --output out --model adapters --after 0": "`--model` 'adapters' holds adapters over '.*', and whole",
    "add-layers --output proc --model model --after 0": "`--output` 'proc' has files in it already, such as",
    "upcycle --output out --model begun": "its training has not come to a checkpoint yet",
    "upcycle --output out --model vq": "a model of type 'moma_vq', not of a model",
    "generate --prompt x --model mdoel": f"`--model` 'mdoel': .*{UNREACHED}",
    "generate --prompt x --model model --mode text --output x.txt": "--output 'x.txt': the mode 'text' writes no file",
    "generate --image x.png --model model --output x.png": "--output 'x.png': the mode 'text' writes no file; texts a",
    "demo nowhere/at/all": "`FOLDER` 'nowhere/at/all': there is no folder",
    "convert llama --output out --processor proc --source ./none": "./none: there is no folder './none'",
    "convert chameleon --output out --source ./none": "./none: no such folder",
    "push --repo-id a/b --dry-run --model ./none": "`model` is './none', which is no folder",
    "train-image-tokenizer typo.yaml --output images-out": "there is no folder 'phots' (did you mean 'photos'?)",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_is_one_line(run, place, line):
    said, expected = run(line), BAD[line]
    for part in expected.split(".*"):
        assert part in said
    assert not (place / "out").exists() and not (place / "images-out").exists()


@pytest.mark.parametrize(
    "line, source",
    [
        ("tokenize r.yaml --processor proc --output photos/out", "'pics', 'photos'"),
        ("train-image-tokenizer r.yaml --output photos/deep/out", "'pics', 'photos'"),
        ("train-image-tokenizer photos --output photos/.out", "'images', 'photos'"),
        ("train-image-tokenizer . --output out", "'images', '.'"),
        ("train-audio-tokenizer sounds.yaml --output photos", "'words', 'photos'"),
    ],
)
def test_output_in_the_data_is_refused_before_anything_is_written(run, place, line, source):
    sounds = {"data": "photos", "audio": "audio", "text": "text"}
    (place / "sounds.yaml").write_text(json.dumps({"sources": {"words": sounds}}))
    before = sorted(place.rglob("*"))
    said, output = run(line), line.split()[-1]
    assert f"`--output` {output!r} lies in the data of source {source}: its files would be read as data" in said
    assert sorted(place.rglob("*")) == before


SERVE = {
    "serve ./nope": "`MODEL` './nope': there is no folder './nope'",
    "serve mdoel": f"`MODEL` 'mdoel': .*{UNREACHED}",
    "serve empty": "`MODEL` 'empty' has no config.json: the folder is empty",
    "serve unfinished": "its training is not finished",
    "serve model": "`MODEL` 'model' has no processor_config.json: the folder holds a model alone",
    "serve cut-pair": "`MODEL` 'cut-pair': the model in it cannot be read",
    "serve nan-pair": "`MODEL` 'nan-pair': the tensor 'lm_head.weight' holds NaN or infinite values",
    "serve pair --device tpu:9": "--device: 'tpu:9' cannot be used",
}


@pytest.fixture(scope="module")
def pairs(place):
    """Models with their processors: a whole one, a damaged one, one that has diverged."""
    for name in ("pair", "cut-pair", "nan-pair"):
        for part in ("proc", "model"):
            shutil.copytree(place / part, place / name, dirs_exist_ok=True)
    os.truncate(place / "cut-pair" / "model.safetensors", 500)
    path = place / "nan-pair" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("line", SERVE)
def test_what_is_wrong_with_a_server_is_one_line(run, pairs, line):
    pytest.importorskip("uvicorn", reason="the extra `serve` is missing")
    said, expected = run(line), SERVE[line]
    for part in expected.split(".*"):
        assert part in said


def test_name_on_the_hub_is_told_from_one_that_is_not_there(run, place, tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub").running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        said = run("generate --prompt x --model someone/nothing")
    assert "`--model` 'someone/nothing': there is no folder" in said and "the Hub has no such model" in said


@pytest.mark.parametrize(
    "line",
    [
        "upcycle --model model --output out",
        "calibrate --model model --processor proc --tokens tokens --output out",
        "tokenize r.yaml --processor proc --output out",
        "convert llama --source model --processor proc --output out",
    ],
)
def test_a_seed_below_zero_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        main([*shlex.split(line), "--seed", "-1"])
    assert "--seed = '-1' must be" in capsys.readouterr().err
