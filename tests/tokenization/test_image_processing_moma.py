# SPDX-License-Identifier: Apache-2.0

import base64
import os
import re
import resource
import socket
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tokenization import MomaImageProcessor, MomaImageProcessorPil
from tokenization.processor_errors_moma import InputError


SIZES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture(params=[MomaImageProcessor, MomaImageProcessorPil])
def image_processor(request):
    return request.param(**SIZES)


def noise(height=20, width=24, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(image_processor, image, **kwargs):
    return image_processor(image, return_tensors="pt", **kwargs)["pixel_values"]


def test_default_size_is_64_and_range_is_minus_one_to_one():
    for cls in (MomaImageProcessor, MomaImageProcessorPil):
        black, white = Image.new("RGB", (80, 100)), Image.new("RGB", (80, 100), "white")
        values = pixels(cls(), [black, white])
        assert values.shape == (2, 3, 64, 64) and values.dtype == torch.float32
        torch.testing.assert_close(values[0], torch.full((3, 64, 64), -1.0))
        torch.testing.assert_close(values[1], torch.full((3, 64, 64), 1.0))


def test_both_backends_give_nearly_the_same_pixels_for_every_kind_of_input():
    pil, array = Image.fromarray(noise(40, 33)), noise(40, 33)
    inputs = [pil, array, torch.from_numpy(array).permute(2, 0, 1), pil.convert("L"), pil.convert("P"), noise(9, 30)]
    for image in inputs:
        ours, twin = (pixels(cls(**SIZES), image) for cls in (MomaImageProcessor, MomaImageProcessorPil))
        assert ours.shape == twin.shape == (1, 3, 16, 16)
        assert (ours - twin).abs().mean() < 5e-3


@pytest.mark.parametrize("height, width", [(8, 64), (8, 65), (8, 200), (7, 200), (8, 201), (300, 6), (301, 6)])
def test_ends_of_a_long_image_do_not_matter_before_the_crop(image_processor, height, width):
    # smooth, as the middle may shift by a part of one of the image's own pixels
    wave = np.sin(np.arange(height)[:, None] / 3) + np.sin(np.arange(width) / 3)
    array = np.repeat(((wave + 2) * 63)[..., None], 3, axis=-1).astype(np.uint8)
    images = pixels(image_processor, Image.fromarray(array))
    # by hand: the whole image is resized, and then its centre taken
    scale = 16 / min(height, width)
    whole = Image.fromarray(array).resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = torch.from_numpy(np.array(whole.crop((left, top, left + 16, top + 16)))).permute(2, 0, 1) / 127.5 - 1
    ratio = max(height, width) / min(height, width)
    assert (images[0] - expected).abs().max() < (0.02 if ratio <= 8 else 0.12)


def test_an_image_that_is_not_cropped_keeps_its_ends(image_processor):
    strip = Image.new("RGB", (400, 2), "white")
    strip.paste("black", (0, 0, 4, 2))
    values = pixels(image_processor, strip, do_center_crop=False)
    assert values.shape == (1, 3, 16, 3200) and values[..., 0].max() == -1


@pytest.mark.parametrize(
    "height, width", [(20, 48), (48, 20), (3, 16), (16, 17), (1, 2000), (2000, 1), (5, 5), (90, 90)]
)
def test_a_padded_image_is_whole_in_the_middle_of_white(image_processor, height, width):
    image = Image.fromarray(noise(height, width))
    scale = 16 / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    expected = Image.new("RGB", (16, 16), "white")
    # by hand: Pillow resizes it and pastes it on a sheet
    resized = image.resize((columns, rows), Image.Resampling.LANCZOS)
    expected.paste(resized, ((16 - columns) // 2, (16 - rows) // 2))
    values = pixels(image_processor, image, do_pad=True)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 127.5 - 1
    assert values.shape == (1, 3, 16, 16)
    assert (values[0] - expected).abs().max() < 0.02


def test_padding_leaves_images_of_the_shape_of_the_crop_as_they_are():
    for cls in (MomaImageProcessor, MomaImageProcessorPil):
        for size, shape in ((16, (40, 40)), ((16, 24), (32, 48))):
            image = Image.fromarray(noise(*shape))
            cropped, padded = (pixels(cls.for_resolution(size, do_pad=do_pad), image) for do_pad in (False, True))
            assert torch.equal(cropped, padded)
        # as high as the crop and half as wide, in one batch with an image that fills it
        batch = [Image.fromarray(noise(32, 24)), Image.fromarray(noise(32, 48))]
        values = pixels(cls.for_resolution((16, 24), do_pad=True), batch)
        assert values.shape == (2, 3, 16, 24)
        assert (values[0, ..., :6] == 1).all() and (values[0, ..., -6:] == 1).all() and not (values[1] == 1).all()


def test_padding_is_white_in_each_range_of_values(image_processor):
    wide = np.zeros((8, 32, 3), dtype=np.uint8)
    for given, settings, white in (
        (wide, {"do_rescale": False, "do_normalize": False}, 255),
        (wide / np.float32(255), {"do_rescale": False, "do_normalize": False}, 1),
        (wide, {"do_normalize": False}, 1),
    ):
        values = pixels(image_processor, given, do_pad=True, **settings)
        assert (values[..., :6, :] == white).all() and (values[..., 6:10, :] == 0).all()


def test_transparency_is_composited_on_white(image_processor):
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    torch.testing.assert_close(pixels(image_processor, clear), torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(pixels(image_processor, np.array(clear)), torch.ones(1, 3, 16, 16))


def test_sixteen_bit_greyscale_is_scaled_and_not_clipped(image_processor, tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = pixels(image_processor, Image.fromarray(eight))
    sixteen = eight.astype(np.uint16) * 257
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    with Image.open(tmp_path / "sixteen.png") as image:
        torch.testing.assert_close(pixels(image_processor, image), expected)
    torch.testing.assert_close(pixels(image_processor, str(tmp_path / "sixteen.png")), expected)
    torch.testing.assert_close(pixels(image_processor, sixteen), expected)
    torch.testing.assert_close(pixels(image_processor, sixteen.astype(">u2")), expected)
    torch.testing.assert_close(pixels(image_processor, Image.fromarray(sixteen.astype(np.int32))), expected)


@pytest.mark.parametrize(("mode", "colour"), [("LA", (0, 128)), ("RGBA", (255, 0, 255, 128))])
def test_premultiplied_colours_are_read_as_plain_ones(image_processor, mode, colour):
    plain = Image.new(mode, (16, 16), colour)
    premultiplied = plain.convert({"LA": "La", "RGBA": "RGBa"}[mode])
    torch.testing.assert_close(pixels(image_processor, premultiplied), pixels(image_processor, plain))


def test_transparent_value_of_sixteen_bit_greyscale_is_composited_on_white(image_processor, tmp_path):
    grey = np.full((16, 16), 1001, dtype=np.uint16)
    grey[:, :8] = 1000
    path = tmp_path / "sixteen.png"
    Image.fromarray(grey).save(path, transparency=1000)
    values = pixels(image_processor, str(path))
    assert (values[..., :8] == 1).all() and (values[..., 8:] < -0.9).all()
    with Image.open(path) as image:
        assert image.info["transparency"] == 1000
        torch.testing.assert_close(pixels(image_processor, image), values)


def test_one_channel_and_bilevel_images_become_three_channels(image_processor):
    grey = Image.fromarray(noise()).convert("L")
    values = pixels(image_processor, grey)
    assert torch.equal(values[:, 0], values[:, 1]) and torch.equal(values[:, 0], values[:, 2])
    torch.testing.assert_close(pixels(image_processor, Image.new("1", (16, 16), 1)), torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(pixels(image_processor, np.ones((16, 16), dtype=bool)), torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_file_raises_a_value_error_that_says_so(image_processor, kind, tmp_path):
    buffer = BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    with pytest.raises(ValueError, match="truncated"):
        image_processor(str(path))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((16, 16, 3), 300, dtype=np.int64), "from 300 to 300"),
        (np.full((16, 16, 3), np.nan, dtype=np.float32), "NaN"),
        (np.zeros((0, 16, 3), dtype=np.uint8), "empty"),
        (np.full((16, 16, 3), 256.5, dtype=np.float32), "from 256.5 to 256.5"),
        (torch.full((3, 16, 16), -1.0), "from -1.0 to -1.0"),
        (np.full((16, 16, 3), 1 + 1j), "complex"),
        (np.full((16, 16, 3), "red", dtype=object), "type object"),
        (Image.new("F", (16, 16)), "mode 'F'"),
        (Image.fromarray(np.full((16, 16), 70000, dtype=np.int32)), "70000"),
        ("no/such/image.png", "neither an existing file"),
        ("images/cat", "no such file exists, and as base64"),
        ("", "no such file exists"),
    ],
)
def test_unreadable_values_raise_and_are_named(image_processor, image, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image)


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "IncompleteRead"),
        (b"what\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n", "Invalid IPv6 URL"),
    ],
)
def test_a_server_that_answers_badly_is_named(image_processor, answer, message):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/image.png"
        with pytest.raises(ValueError, match=f"images: '{address}' cannot be fetched .*{message}"):
            image_processor(address)
        thread.join()


@pytest.mark.parametrize("address", ["http://[::1/", "http://127.0.0.1:x/", "http://127.0.0.1/ü.png", "http://a b/"])
def test_malformed_addresses_are_named(image_processor, address):
    with pytest.raises(ValueError, match=f"images: {re.escape(repr(address))} cannot be fetched"):
        image_processor(address)


def saved(image, kind, **kwargs):
    buffer = BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def damaged_files():
    """Files that their decoders refuse in ways of their own."""
    image = Image.fromarray(noise(64, 64))
    # a JPEG whose orientation, 6 in one short number, is said to be a text
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = saved(image, "JPEG", exif=exif)
    place = jpeg.index(b"\x01\x12\x00\x03") if b"\x01\x12\x00\x03" in jpeg else jpeg.index(b"\x12\x01\x03\x00")
    yield "orientation", jpeg[: place + 2] + jpeg[place + 2 : place + 4].replace(b"\x03", b"\x02") + jpeg[place + 4 :]
    # a PNG of four gigapixels, by its header
    png = saved(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + (65536).to_bytes(4, "big") * 2 + png[24:29]
    yield "bomb", png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    # what PostScript would do, Ghostscript does
    yield "postscript", saved(image, "EPS")
    for kind in ("AVIF", "JPEG2000", "TIFF", "GIF", "BMP", "ICO", "WEBP", "PNG"):
        if kind not in Image.SAVE:
            continue
        data = saved(image, kind)
        for seed in range(40):
            rng = np.random.default_rng(seed)
            mutated = bytearray(data)
            for place in rng.integers(0, len(data), size=rng.integers(1, 12)):
                mutated[place] = rng.integers(256)
            yield f"{kind} {seed}", bytes(mutated)
    dds = bytearray(saved(image, "DDS"))
    dds[84:88] = b"ABCD"
    yield "DDS", bytes(dds)


def test_damaged_files_are_read_or_refused_with_a_value_error(image_processor, tmp_path):
    refused = {}
    for name, data in damaged_files():
        path = tmp_path / "image"
        path.write_bytes(data)
        try:
            image_processor(str(path))
        except ValueError as error:
            refused[name] = str(error)
            assert str(path) in refused[name]
    assert {"bomb", "postscript", "DDS"} <= refused.keys() and len(refused) > 20


def test_want_of_file_handles_is_not_called_damage(image_processor, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise()).save(path)
    # decoders are imported from files of their own
    image_processor(str(path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(open(os.devnull))
        with pytest.raises(OSError, match="Too many open files"):
            image_processor(str(path))
    finally:
        for file in taken:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_base64_is_read_as_tools_write_it(image_processor):
    image = Image.fromarray(noise())
    data = saved(image, "PNG")
    encoded, safe = base64.encodebytes(data).decode(), base64.urlsafe_b64encode(data).decode()
    assert "\n" in encoded and set("-_") & set(safe)
    expected = pixels(image_processor, image)
    for text in (
        encoded,
        safe,
        safe.rstrip("="),
        f"data:image/png;base64, {encoded}",
        f"data:image/png;base64,{safe}",
    ):
        torch.testing.assert_close(pixels(image_processor, text), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_floating_point_tensors_give_what_eight_bits_give(image_processor, dtype, do_rescale):
    # sharp edges, at which the filter overshoots; all values are exact in any of these types
    array = np.where(noise(40, 33) < 128, 0, 255).astype(np.uint8)
    expected = pixels(image_processor, torch.from_numpy(array).permute(2, 0, 1))
    tensor = torch.from_numpy(array).permute(2, 0, 1).to(dtype) / (1 if do_rescale else 255)
    values = pixels(image_processor, tensor, do_rescale=do_rescale)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    if dtype != torch.bfloat16:
        assert torch.equal(pixels(image_processor, tensor.numpy(), do_rescale=do_rescale), values)


def test_values_of_any_range_keep_it_and_do_not_depend_on_their_neighbours(image_processor):
    wide = torch.from_numpy(noise(40, 33)).permute(2, 0, 1).float() / 255 * 3 - 1
    plain = {"do_rescale": False, "do_normalize": False}
    alone = pixels(image_processor, wide, **plain)
    assert -1 <= alone.min() < -0.2 and 1.2 < alone.max() <= 2
    beside = pixels(image_processor, [wide.clamp(0, 1), wide], **plain)
    torch.testing.assert_close(beside[1:], alone, rtol=0, atol=1e-6)


def test_wrong_type_of_image_raises_type_error(image_processor):
    with pytest.raises(TypeError, match="got int"):
        image_processor([3])


@pytest.mark.parametrize("shape", [(16, 16, 2), (5, 16, 16)])
def test_arrays_of_other_channels_are_named_by_their_shape(image_processor, shape):
    with pytest.raises(InputError, match=rf"images: an array of shape \({shape[0]},.* is no image .*3 or 4 channels"):
        image_processor([np.zeros(shape, dtype=np.uint8)])


def test_postprocess_undoes_preprocess(image_processor):
    image = Image.fromarray(noise(16, 16))
    values = pixels(image_processor, image)
    back = image_processor.postprocess(values, return_tensors="PIL.Image.Image")["pixel_values"]
    assert len(back) == 1 and back[0].mode == "RGB"
    assert np.array_equal(np.array(back[0]), np.array(image))
    tensor = image_processor.postprocess(values * 3, return_tensors="pt")["pixel_values"]
    assert tensor.dtype == torch.uint8 and tensor.shape == (1, 3, 16, 16)
    # whatever torch's default device is
    with torch.device("meta"):
        again = image_processor.postprocess(values * 3, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, tensor)


@pytest.mark.parametrize("values", [torch.zeros(2, 4, 8, 8), torch.full((1, 3, 8, 8), float("nan"))])
def test_postprocess_refuses_what_is_no_image(image_processor, values):
    with pytest.raises(ValueError, match="images"):
        image_processor.postprocess(values)
