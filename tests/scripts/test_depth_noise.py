# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch

from depth_noise import main
from emoji_recipe.depth_noise import (
    LOSSES,
    TOP_K,
    break_even,
    break_even_text,
    noise_report,
    noise_sweep,
    plot_noise,
    summarize,
)
from emoji_recipe.depth_selection import depth_routers, flipped_depth, watched_depth
from helpers.tiny import tiny_documents, tiny_model, tiny_processor, write_tokens
from modeling_moma.training.examples import shuffled_held_out
from modeling_moma.training.measures import held_out_loss


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2]}
# labels of unlike lengths, so that batches are padded
LABELS = ["apple", "red apple", "castle of the green apples", "fruit"]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def examples(processor):
    return shuffled_held_out([tiny_documents(processor, 12, labels=LABELS)], seed=0)


@pytest.fixture(scope="module")
def model(processor):
    model = tiny_model(processor, **DEPTH)
    with torch.no_grad():
        for router in depth_routers(model).values():
            # at its small initialisation no decision would matter
            router.weight.normal_()
    return model


@pytest.fixture
def inputs(processor, examples):
    batch = processor.tokenizer.pad(examples[:8], return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    return dict(batch)


def chosen_by_layer(model, inputs, depth_routing="expert_choice"):
    """The selections that the layers get, after all hooks that are there already."""
    chosen, handles = {}, []
    for layer, router in depth_routers(model).items():

        def keep(module, args, output, layer=layer):
            chosen[layer] = output[1].chosen_BT

        handles.append(router.register_forward_hook(keep))
    with torch.inference_mode():
        logits = model(**inputs, routing="threshold", depth_routing=depth_routing).logits
    for handle in handles:
        handle.remove()
    return chosen, logits


def test_no_noise_changes_no_bit(model, inputs):
    _, plain = chosen_by_layer(model, inputs)
    with flipped_depth(model, 0.0):
        _, noisy = chosen_by_layer(model, inputs)
    assert torch.equal(noisy, plain)


def test_full_noise_flips_every_token_and_no_padding(model, inputs):
    is_token = inputs["attention_mask"].bool()
    plain, _ = chosen_by_layer(model, inputs)
    with flipped_depth(model, 1.0):
        flipped, logits = chosen_by_layer(model, inputs)
    # later layers get other hidden states
    assert torch.equal(flipped[0], ~plain[0] & is_token)
    assert not (flipped[2] & ~is_token).any()
    assert logits.isfinite().all()


@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_flipped_share_is_sigma_within_its_standard_error(model, processor, examples, sigma):
    with flipped_depth(model, sigma, seed=3), watched_depth(model) as tallies:
        held_out_loss(model, processor, examples, 8, "threshold", depth_routing="expert_choice")
    for tally in tallies.values():
        decisions = int(tally.tokens_M.sum())
        assert decisions == sum(len(example["input_ids"]) for example in examples)
        assert abs(tally.error_rate - sigma) < 4 * math.sqrt(sigma * (1 - sigma) / decisions)


def test_a_seed_flips_the_same_decisions_and_more_of_them_with_more_noise(model, inputs):
    plain, _ = chosen_by_layer(model, inputs)
    flips = []
    for sigma, seed in ((0.1, 5), (0.1, 5), (0.3, 5), (0.1, 6)):
        with flipped_depth(model, sigma, seed):
            flips.append(chosen_by_layer(model, inputs)[0][0] ^ plain[0])
    assert torch.equal(flips[0], flips[1])
    assert not (flips[0] & ~flips[2]).any() and flips[2].sum() > flips[0].sum()
    assert not torch.equal(flips[0], flips[3])


def test_hooks_are_gone_afterwards_even_after_an_error(model, inputs):
    _, plain = chosen_by_layer(model, inputs)
    with pytest.raises(KeyboardInterrupt):
        with flipped_depth(model, 1.0), watched_depth(model):
            raise KeyboardInterrupt
    assert not any(router._forward_hooks for router in depth_routers(model).values())
    assert torch.equal(chosen_by_layer(model, inputs)[1], plain)


def test_tally_counts_choices_by_modality_and_errors_of_threshold(model, inputs):
    config = model.config
    start, stop = config.modality_token_ranges["image"][0]
    is_token = inputs["attention_mask"].bool()
    is_image = (inputs["input_ids"] >= start) & (inputs["input_ids"] < stop)
    best, _ = chosen_by_layer(model, inputs)
    with watched_depth(model) as tallies:
        chosen, _ = chosen_by_layer(model, inputs, "threshold")
    tally = tallies[0]
    assert tally.tokens_M.tolist() == [int((is_token & ~is_image).sum()), int(is_image.sum())]
    assert tally.chosen_M.tolist() == [int((chosen[0] & ~is_image).sum()), int((chosen[0] & is_image).sum())]
    assert int(tally.wrong_M.sum()) == int((chosen[0] ^ best[0]).sum()) > 0
    part = tally.describe(config.modalities)
    assert part["load"] == pytest.approx((chosen[0].sum() / is_token.sum()).item())
    assert part["mix_of_chosen"]["image"] == pytest.approx(
        (chosen[0] & is_image).sum().item() / chosen[0].sum().item()
    )


def test_top_k_has_no_errors_against_itself(model, inputs):
    with watched_depth(model) as tallies:
        chosen_by_layer(model, inputs)
    assert [tally.error_rate for tally in tallies.values()] == [0, 0]


def test_bad_input_is_told(model, processor, inputs):
    for sigma in (-0.1, 5):
        with pytest.raises(ValueError, match="sigma"), flipped_depth(model, sigma):
            pass
    with pytest.raises(ValueError, match="depth layers"), flipped_depth(tiny_model(processor), 0.1):
        pass
    with pytest.raises(ValueError, match="training mode"), watched_depth(tiny_model(processor, **DEPTH).train()):
        pass


def test_break_even_lies_on_the_line_between_two_points():
    sigmas = [0.0, 0.01, 0.03]
    assert break_even(sigmas, [1.0, 1.2, 1.6], 1.1) == pytest.approx(0.005)
    assert break_even(sigmas, [1.0, 1.2, 1.6], 1.5) == pytest.approx(0.025)
    # on the line is not above it
    assert break_even(sigmas, [1.0, 1.2, 1.6], 1.2) == pytest.approx(0.01)
    assert break_even(sigmas, [1.0, 1.2, 1.6], 0.9) is None
    assert break_even(sigmas, [1.0, 1.2, 1.6], 1.6) is None


def sweep(shift):
    def loss(value):
        return dict.fromkeys(LOSSES, value + shift)

    return {
        "noise": [{"sigma": 0.0, "loss": loss(1.0)}, {"sigma": 0.02, "loss": loss(1.4)}],
        "threshold": {"loss": loss(1.25), "error_rate": 0.01, "layers": [{"layer": 4, "error_rate": 0.01 + shift}]},
    }


def test_summary_has_means_spreads_and_break_even_of_known_numbers():
    baselines = [dict.fromkeys(LOSSES, loss) for loss in (1.1, 1.3)]
    summary = summarize([sweep(0.0), sweep(0.1)], baselines)
    part = summary["text"]
    assert part["noise"][1] == {"mean": pytest.approx(1.45), "std": pytest.approx(0.1 / math.sqrt(2))}
    assert part["without_depth"]["mean"] == pytest.approx(1.2)
    assert part["break_even"]["mean"] == pytest.approx(0.0075)
    assert part["break_even"]["models"] == pytest.approx([0.01, 0.005])
    text = noise_report(summary)
    for line in (
        "| break-even | 0.75 % | 0.75 % | 0.75 % |",
        "Break-even over all tokens: 0.75 %; the paper's: 0.5 %",
        f"| {TOP_K}: 2 % | 1.4500 ± 0.0707 |",
        "| depth: threshold (causal) | 1.3000 ± 0.0707 |",
        "| 4 | 6.00 ± 7.07 % |",
    ):
        assert line in text, line


def test_a_loss_that_never_crosses_says_on_which_side_it_stays():
    for loss, words in ((0.5, "already"), (2.0, "up to 2 %")):
        summary = summarize([sweep(0.0)], [dict.fromkeys(LOSSES, loss)])
        text = break_even_text(summary["overall"], summary["sigmas"])
        assert text.startswith("None") and words in text
        assert summary["overall"]["noise"][0]["std"] is None


def test_sweep_without_noise_is_the_held_out_loss(model, processor, examples):
    result = noise_sweep(model, processor, examples, 8, (0.0, 0.5))
    plain = held_out_loss(model, processor, examples, 8, "threshold", depth_routing="expert_choice")
    assert result["noise"][0] == {"sigma": 0.0, "loss": plain, "flipped": 0}
    assert result["noise"][1]["loss"] != plain
    causal = held_out_loss(model, processor, examples, 8, "threshold")
    assert result["threshold"]["loss"] == causal
    errors = [layer["error_rate"] for layer in result["threshold"]["layers"]]
    assert result["threshold"]["error_rate"] == pytest.approx(sum(errors) / 2)


def test_equal_numbers_give_equal_plots(tmp_path):
    pytest.importorskip("matplotlib")
    summary = summarize([sweep(0.0), sweep(0.1)], [dict.fromkeys(LOSSES, 1.2)])
    for name in ("one", "two"):
        plot_noise(summary, tmp_path / name)
    assert (tmp_path / "one").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_script_writes_report_and_plot(model, processor, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model.save_pretrained(tmp_path / "depth")
    tiny_model(processor).save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "processor")
    write_tokens(tmp_path / "tokens", processor, labels=LABELS, train=12, validation=12)
    paths = {name: str(tmp_path / name) for name in ("depth", "plain", "processor", "tokens")}
    options = f"--processor {paths['processor']} --tokens {paths['tokens']} --limit 6 --sigmas 0.05 0"
    options += f" --output {tmp_path / 'noise.json'}"
    main(["--models", paths["depth"], paths["depth"], "--baseline", paths["plain"], *options.split()])
    report = json.loads((tmp_path / "noise.json").read_text())
    assert (report["examples"], report["batch_size"], report["summary"]["sigmas"]) == (12, 32, [0, 0.05])
    assert "sees the future" in report["noise_is"]
    assert report["summary"]["overall"]["noise"][0]["std"] == 0
    assert "the paper's: 0.5 %" in capsys.readouterr().out
    assert (tmp_path / "noise.png").stat().st_size > 0
    with pytest.raises(ValueError, match="must have none"):
        main(["--models", paths["depth"], "--baseline", paths["depth"], *options.split()])
