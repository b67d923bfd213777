# SPDX-License-Identifier: Apache-2.0
"""The page, and the server that shows it."""

import socket
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from ..errors_moma import InputError
from .inputs import MOST_BYTES, Examples
from .studio import DemoSession
from .tabs import caption_tab, draw_tab, interleaved_tab, label_tab, routing_tab, sound_tab


# one visitor more than these that wait for the model is told that the queue is full
MOST_WAITING = 32
# uploads are deleted every hour, once they are an hour old
CLEANING = (3600, 3600)
ABOUT = "One decoder reads and writes words and images: an image is a row of codes among the words."
CSS = """
.moma-words { line-height: 2.2; }
.moma-legend div { margin: 4px 0; }
.moma-answer img { margin: 6px 0; }
.moma-image img { width: 100%; height: 100%; object-fit: contain; }
"""


def build_page(studio: DemoSession, examples: Examples | None = None) -> gr.Blocks:
    """Return a page of five tabs for one model, and of six where it hears."""
    examples = examples or Examples()
    # by default Gradio reports each page to its makers
    with gr.Blocks(title=f"{studio.name}: MoMa", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.Markdown(f"# {studio.name}\n{ABOUT}")
        with gr.Tab("Caption"):
            caption_tab(studio, examples)
        with gr.Tab("Names"):
            label_tab(studio, examples)
        with gr.Tab("Draw"):
            draw_tab(studio, examples)
        if studio.sampling_rate is not None:
            with gr.Tab("Sounds"):
                sound_tab(studio, studio.sampling_rate)
        with gr.Tab("Interleaved"):
            interleaved_tab(studio)
        with gr.Tab("Routing"):
            routing_tab(studio, examples)
    for block in page.blocks.values():
        _refuse_addresses(block)
    # otherwise requests to Gradio's own API pass by the queue
    return page.queue(max_size=MOST_WAITING, api_open=False)


def _refuse_addresses(block: Any) -> None:
    """Have a part of the page take uploads alone: Gradio would download what a request names, of any size."""
    move = block.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if is_http_url_like(path):
            raise gr.Error("This file was not uploaded to this page.")
        return await move(path)

    block.async_move_resource_to_block_cache = move_upload


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def open_page(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Start the page's server in threads of this process, which fetches nothing and sends nothing elsewhere."""
    # fonts of the visitor's system are not fetched from elsewhere
    theme = gr.themes.Soft(
        primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=free_port() if port == 0 else port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            max_file_size=MOST_BYTES,
            footer_links=[],
            run_history=False,
            show_error=False,
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise InputError(f"--host, --port: nobody can listen on {host}:{port} ({error}).") from error
    except ValueError as error:
        # Gradio's advice is a tunnel through its makers' servers
        raise InputError(
            f"--host, --port: the page on {host or 'this machine'} does not answer this process in time. Does "
            "`http_proxy` or `https_proxy` stand in the way (`no_proxy=localhost`), or is the machine busy?"
        ) from error
    return address
