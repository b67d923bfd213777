# SPDX-License-Identifier: Apache-2.0
"""Sounds for tests: tones, files of them, and tiny codecs with random codebooks."""

from io import BytesIO

import numpy as np
import soundfile
import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel, PreTrainedModel

from helpers.tiny import tiny_processor
from tokenization import MomaProcessor, add_modality_tokens
from tokenization.audio_codecs_moma import LibraryAudioCodec, MelCodec


RATE = 8000
# fields of a model of its processor
THREE = {"num_experts": {"text": 2, "image": 2, "audio": 2}}
MELS = {"sampling_rate": RATE, "hop_length": 40, "win_length": 160, "num_mels": 8, "frames_per_code": 2}


def tone(frequency: float, seconds: float = 0.05, rate: int = RATE) -> np.ndarray:
    """A sine, as float32."""
    places = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * places)).astype(np.float32)


def as_file(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", **options) -> bytes:
    """The bytes of a file of sound."""
    file = BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def tiny_mel_codec(codes: int = 32, **settings) -> MelCodec:
    """A codec whose codebook holds vectors of random tones."""
    settings = {**MELS, **settings}
    untrained, rng = MelCodec.untrained(**settings), np.random.default_rng(0)
    rate = settings["sampling_rate"]
    sounds = [tone(frequency, 0.1, rate) for frequency in rng.uniform(100, rate / 2 - 200, 2 * codes)]
    vectors = torch.cat([untrained.log_mels(sound)[1:2] for sound in sounds])
    return MelCodec(vectors[:codes], **settings)


def tiny_library_model(name: str) -> PreTrainedModel:
    """A tiny model of Transformers of eight samples a frame, or sixteen for Mimi, with codes that differ."""
    torch.manual_seed(0)
    if name == "encodec":
        config = EncodecConfig(
            target_bandwidths=[4.0, 8.0, 20.0],
            sampling_rate=RATE,
            num_filters=4,
            num_residual_layers=1,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            codebook_dim=8,
            hidden_size=8,
            num_lstm_layers=1,
        )
        model = EncodecModel(config)
    elif name == "dac":
        config = DacConfig(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            decoder_hidden_size=16,
            upsampling_ratios=[4, 2],
            n_codebooks=3,
            codebook_size=16,
            codebook_dim=4,
            sampling_rate=RATE,
        )
        model = DacModel(config)
    else:
        config = MimiConfig(
            sampling_rate=RATE,
            frame_rate=500,
            num_filters=4,
            hidden_size=16,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            codebook_dim=8,
            num_quantizers=4,
            vector_quantization_hidden_dimension=8,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            upsample_groups=16,
        )
        model = MimiModel(config)
    for part, values in model.named_buffers():
        # codebooks begin as zeros, of which all sounds have the same code
        if part.endswith(("embed", "embed_sum")):
            values.normal_()
    return model.eval()


def processor_of_sounds(codec: "MelCodec | LibraryAudioCodec | None" = None) -> MomaProcessor:
    """The tiny processor with a codec of sounds, whose prompts end side by side."""
    codec = codec or tiny_mel_codec()
    images = tiny_processor()
    tokenizer = add_modality_tokens(images.tokenizer, "audio", codec.num_codes)
    tokenizer.padding_side = "left"
    return MomaProcessor(images.image_processor, tokenizer, images.vq_model, codecs={"audio": codec})
