"""Serves the page until it is stopped, and leaves no file behind."""
from __future__ import annotations

import os
import tempfile
import time
import webbrowser
from pathlib import Path
from typing import Callable, Optional, Sequence

from ..options import OptionError

MEGAPIXELS, MEGABYTES = 8, 50  # of an upload, if nothing else is said
HOST = '127.0.0.1'


def check_installed() -> None:
    """Refuses to go on without Gradio.

    Raises:
        OptionError: It is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise OptionError('demo', "needs gradio: pip install 'cdnsr-basicsr[demo]' (Python 3.10 or newer)") from error


def serve(models: Sequence[str],
          device: str,
          host: str = HOST,
          port: Optional[int] = None,
          max_megapixels: float = MEGAPIXELS,
          max_megabytes: float = MEGABYTES,
          browser: bool = True,
          say: Callable[[str], None] = lambda text: None) -> None:
    """Serves the page until the process is interrupted or ended.

    Args:
        models: Names or paths of models; the page begins with the first.
        device: The device that the page begins with.
        host: Address to listen at; '0.0.0.0' for all of the machine's.
        port: Default: the first free one from 7860 on.
        max_megapixels, max_megabytes: Larger uploads are refused.
        browser: Whether to open the page in a browser.
        say: Told where the page is.

    Raises:
        OptionError: Gradio is not installed, a model cannot be used, or the port cannot be had.
    """
    # in the end this folder is gone, and with it all that visitors bring, also what Gradio alone has seen of it
    with tempfile.TemporaryDirectory(prefix='basicsr-demo-', ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1')
        check_installed()
        from .page import THEME, Limits, Page, read
        page = Page(models, device, Limits(max_megabytes, max_megapixels), Path(folder))
        blocks = page.build()
        try:
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=round(max_megabytes * 2**20),
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                theme=THEME,
                css=read('page.css'))
        except OSError as error:
            raise OptionError(f'port={port}' if port else f'host={host}',
                              'cannot be listened on: in use, or not an address of this machine') from error
        try:
            say(url)
            if browser:
                webbrowser.open(url)
            while True:
                time.sleep(3600)
        finally:
            page.sessions.end_all()
